"""The client's patience, against servers that are busy, down or odd: they answer over real HTTP as the test says."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from http_endpoint import in_process
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lora_diffusion.client import ApiError, AsyncClient, Client, Retry

Answer = Callable[[int], Response]
LORAS = {"loras": [{"id": "0" * 32, "expires_in": 60.0}]}


def busy(status: int, wait: str) -> Response:
    problem = {"detail": "Too much to do.", "reason": "overloaded", "status": status}
    return JSONResponse(problem, status, {"Retry-After": wait})


class Odd:
    """A server whose n-th answer is `answer(n)`; `times` of the requests."""

    def __init__(self, answer: Answer) -> None:
        self.times: list[float] = []

        async def every(request: Request) -> Response:
            await request.body()
            self.times.append(time.monotonic())
            return answer(len(self.times))

        self.app = Starlette(routes=[Route("/{path:path}", every, methods=["GET", "POST", "DELETE"])])


def ask_both_ways(address: str, **settings: Any) -> Iterator[Callable[[], Any]]:
    def sync() -> Any:
        with Client(address, **settings) as client:
            return client.loras(b"photo")

    def awaited() -> Any:
        async def ask() -> Any:
            async with AsyncClient(address, **settings) as client:
                return await client.loras(b"photo")

        return asyncio.run(_typed(ask()))

    yield sync
    yield awaited


async def _typed(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_no_sooner_than_it_says(status: int) -> None:
    odd = Odd(lambda n: busy(status, "0.4") if n % 3 else JSONResponse(LORAS, 201))
    with in_process(odd.app) as address:
        for ask in ask_both_ways(address, retry=Retry(first_wait=0.01)):
            odd.times.clear()
            assert ask()[0].id == "0" * 32
            assert len(odd.times) == 3
            assert np.diff(odd.times).min() >= 0.4


def test_a_proxy_that_knows_no_routes_yet_is_asked_again_and_a_lora_that_is_not_there_is_not() -> None:
    words = "Path '/v1/loras' not found. Ping http://.../-/routes for available routes."  # of Ray's HAProxy and of its Python proxy
    odd = Odd(lambda n: PlainTextResponse(words, 404) if n < 3 else JSONResponse(LORAS, 201))
    gone = Odd(lambda n: JSONResponse({"detail": "No LoRA.", "reason": "unknown_lora", "status": 404}, 404))
    with in_process(odd.app) as address, in_process(gone.app) as other:
        for ask in ask_both_ways(address, retry=Retry(first_wait=0.01)):
            odd.times.clear()
            assert ask()[0].id == "0" * 32
        for ask in ask_both_ways(other, retry=Retry(first_wait=0.01)):
            gone.times.clear()
            with pytest.raises(ApiError, match="No LoRA"):
                ask()
            assert len(gone.times) == 1


@pytest.mark.parametrize("usegmt", [True, False])  # RFC 9110's form, and -0000, which names no zone
def test_retry_after_may_be_a_date(usegmt: bool) -> None:
    response = httpx.Response(503, headers={"Retry-After": email.utils.formatdate(time.time() + 10, usegmt=usegmt)})
    seconds = Retry().wait(1, response, time.monotonic() + 60)
    assert seconds is not None
    assert 8 <= seconds <= 10


@pytest.mark.parametrize(
    ("status", "again"), [(429, True), (502, True), (503, True), (500, False), (504, False), (409, False)]
)
def test_what_is_asked_again(status: int, again: bool) -> None:
    assert (Retry().wait(1, httpx.Response(status), time.monotonic() + 60) is not None) == again


def test_waits_grow_and_stay_below_their_bound() -> None:
    retry = Retry(attempts=100, first_wait=1, max_wait=8)
    failure = httpx.ConnectError("down")
    for attempt, most in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8)):
        waits = [retry.wait(attempt, failure, time.monotonic() + 1e6) for _ in range(50)]
        assert all(wait is not None and most / 2 <= wait <= most for wait in waits)
        assert len(set(waits)) > 1  # many clients do not come back at one moment


def test_a_server_that_stays_busy_is_given_up_before_the_time_is_over() -> None:
    odd = Odd(lambda n: busy(503, "30"))
    with in_process(odd.app) as address:
        for ask in ask_both_ways(address, timeout=5):
            began = time.monotonic()
            with pytest.raises(ApiError, match="Too much") as error:
                ask()
            assert error.value.status == 503
            assert time.monotonic() - began < 5  # the answer would come too late: no use in waiting for it


def test_no_more_attempts_than_allowed() -> None:
    odd = Odd(lambda n: busy(429, "0"))
    with in_process(odd.app) as address:
        for ask in ask_both_ways(address, retry=Retry(attempts=3, first_wait=0.01)):
            odd.times.clear()
            with pytest.raises(ApiError):
                ask()
            assert len(odd.times) == 3


def test_a_server_that_is_down_is_a_transport_error() -> None:
    with in_process(Odd(lambda n: busy(503, "0")).app) as address:
        pass
    for ask in ask_both_ways(address, retry=Retry(attempts=2, first_wait=0.01)):
        with pytest.raises(httpx.ConnectError):
            ask()


def test_errors_without_a_problem_document_are_told_by_their_status() -> None:
    with in_process(Odd(lambda n: Response("<html>oops</html>", 500)).app) as address:
        for ask in ask_both_ways(address):
            with pytest.raises(ApiError, match="500"):
                ask()


def test_the_key_is_sent() -> None:
    keys = []

    async def every(request: Request) -> Response:
        keys.append(request.headers.get("authorization"))
        return JSONResponse({})

    with in_process(Starlette(routes=[Route("/v1/model", every)])) as address, Client(address, api_key="k") as client:
        client.model()
    assert keys == ["Bearer k"]
