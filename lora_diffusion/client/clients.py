"""Client and AsyncClient: the same calls, waited for or awaited."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import httpx

from lora_diffusion.client import calls
from lora_diffusion.client.answers import Event
from lora_diffusion.client.calls import Call, EventReader, PersonalizeOptions, Photo
from lora_diffusion.client.retry import Retry

P = ParamSpec("P")
T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"
GRACE_SECONDS = 2.0
"""The server ends a request at its deadline, and says so; only then do we hang up."""


class _Shared:
    """url: of the server. api_key: if it asks for one. timeout: seconds for a call in all, retries included."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 60.0, retry: Retry | None = None
    ) -> None:
        self._settings: dict[str, Any] = {
            "base_url": url.rstrip("/") + "/",
            "headers": {
                calls.DELETION_TOKEN: secrets.token_hex(16),  # what this client makes, it may delete
                **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            "follow_redirects": False,
        }
        self._timeout = timeout
        self._retry = retry or Retry()

    def _request(self, http: httpx.Client | httpx.AsyncClient, call: Call[Any], deadline: float) -> httpx.Request:
        left = max(0.001, deadline - time.monotonic())
        headers = {"Accept": call.accept, "X-Request-Timeout-Seconds": f"{left:.3f}", **call.headers}
        return http.build_request(call.method, call.path, headers=headers, timeout=left + GRACE_SECONDS, **call.body())

    def _next_wait(self, attempt: int, outcome: httpx.Response | httpx.TransportError, deadline: float) -> float:
        """Seconds before the next attempt. Raises ApiError, or httpx.TransportError, if there is to be none."""
        seconds = self._retry.wait(attempt, outcome, deadline)
        if seconds is not None:
            return seconds
        if isinstance(outcome, httpx.Response):
            raise calls.problem(outcome)
        raise outcome


def _now(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """The call that `build` describes, as a method of Client."""

    @wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._call(build(*args, **kwargs))

    return _shown(method, build)


def _awaited(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """The same, as a method of AsyncClient."""

    @wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._call(build(*args, **kwargs))

    return _shown(method, build)


def _shown(method: T, build: Callable[..., Any]) -> T:
    """The method with the signature that a reader expects: with self, and what the call answers."""
    signature = inspect.signature(build)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
    answer = str(signature.return_annotation).removeprefix("Call[").removesuffix("]")
    vars(method)["__signature__"] = signature.replace(parameters=parameters, return_annotation=answer)
    return method


class Client(_Shared):
    """The endpoint, from a program.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     made = client.personalize("ada.jpg", "a photo of sks person, forest background", num_images=4)
    ...     made.images[0].save("ada.png")
    ...     client.download(made.lora, "kohya").save("ada.safetensors")

    A server that is busy (429, 503) or cannot be reached is asked again, no sooner than it says.

    Raises (every call):
        ApiError: the server refused; `reason` and the message say why.
        httpx.TransportError: it could not be reached in time.
        OSError: a photo cannot be read.
    """

    personalize = _now(calls.personalize)
    embeddings = _now(calls.embeddings)
    latents = _now(calls.latents)
    loras = _now(calls.loras)
    upload = _now(calls.upload)
    download = _now(calls.download)
    delete = _now(calls.delete)
    images = _now(calls.images)
    edit = _now(calls.edit)
    interpolate = _now(calls.interpolate)
    likeness = _now(calls.likeness)
    model = _now(calls.model)

    def __init__(
        self, url: str = DEFAULT_URL, *, transport: httpx.BaseTransport | None = None, **settings: Any
    ) -> None:
        super().__init__(url, **settings)
        self._http = httpx.Client(transport=transport, **self._settings)

    def personalize_events(
        self, photos: Photo | Sequence[Photo], prompt: str, **options: Unpack[PersonalizeOptions]
    ) -> Iterator[Event]:
        """`personalize` as it happens: the LoRA, progress, each picture when it is ready, and last all of it without the data."""
        return self._events(calls.personalize(photos, prompt, **options).as_events())

    def _events(self, call: Call[Any]) -> Iterator[Event]:
        response = self._send(call, stream=True)
        reader = EventReader()
        try:
            for line in response.iter_lines():
                if event := reader.line(line):
                    yield event
        finally:
            response.close()

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, call: Call[T]) -> T:
        return call.parse(self._send(call, stream=False))

    def _send(self, call: Call[Any], stream: bool) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            attempt += 1
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.send(self._request(self._http, call, deadline), stream=stream)
                if call.accepts(outcome):
                    return outcome
                outcome.read()
                outcome.close()
            except httpx.TransportError as error:
                outcome = error
            time.sleep(self._next_wait(attempt, outcome, deadline))


class AsyncClient(_Shared):
    """`Client` for asyncio: every call is awaited, `personalize_events` is iterated with `async for`."""

    personalize = _awaited(calls.personalize)
    embeddings = _awaited(calls.embeddings)
    latents = _awaited(calls.latents)
    loras = _awaited(calls.loras)
    upload = _awaited(calls.upload)
    download = _awaited(calls.download)
    delete = _awaited(calls.delete)
    images = _awaited(calls.images)
    edit = _awaited(calls.edit)
    interpolate = _awaited(calls.interpolate)
    likeness = _awaited(calls.likeness)
    model = _awaited(calls.model)

    def __init__(
        self, url: str = DEFAULT_URL, *, transport: httpx.AsyncBaseTransport | None = None, **settings: Any
    ) -> None:
        super().__init__(url, **settings)
        self._http = httpx.AsyncClient(transport=transport, **self._settings)

    def personalize_events(
        self, photos: Photo | Sequence[Photo], prompt: str, **options: Unpack[PersonalizeOptions]
    ) -> AsyncIterator[Event]:
        return self._events(calls.personalize(photos, prompt, **options).as_events())

    async def _events(self, call: Call[Any]) -> AsyncIterator[Event]:
        response = await self._send(call, stream=True)
        reader = EventReader()
        try:
            async for line in response.aiter_lines():
                if event := reader.line(line):
                    yield event
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _call(self, call: Call[T]) -> T:
        return call.parse(await self._send(call, stream=False))

    async def _send(self, call: Call[Any], stream: bool) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            attempt += 1
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.send(self._request(self._http, call, deadline), stream=stream)
                if call.accepts(outcome):
                    return outcome
                await outcome.aread()
                await outcome.aclose()
            except httpx.TransportError as error:
                outcome = error
            await asyncio.sleep(self._next_wait(attempt, outcome, deadline))
