"""What a route declares: who may ask it, and that its body is JSON or a form. Nothing is decided by the text of a path."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lora_diffusion.endpoint.access import Access, AdmissionControl, SlowBodies, client_address
from lora_diffusion.endpoint.body import read_values
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.serving.config import LimitsConfig

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True)
class Gate:
    """What stands before the routes that want a key; `app.state.gate`."""

    access: Access
    admission: AdmissionControl
    slow: SlowBodies
    limits: LimitsConfig
    proxies: int


def public(endpoint: Endpoint) -> Endpoint:
    """Declares that an endpoint needs no key, and no room: the page, docs, health, metrics."""
    endpoint.public = True  # type: ignore[attr-defined]
    return endpoint


class Route(APIRoute):
    """A route that wants a key, and counts as work, unless its endpoint is `public`."""

    @property
    def public(self) -> bool:
        return getattr(self.endpoint, "public", False)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self.path
        if self.public:
            await super().handle(scope, receive, send)
            return
        gate: Gate = scope["app"].state.gate
        headers = Headers(scope=scope)
        address = client_address(scope, headers, gate.proxies)
        owner = scope["state"]["owner"] = gate.access.check(headers, address)
        scope["state"]["watched"] = partial(gate.slow.watched, owner.key or address)
        with gate.admission.admitted() as begin:
            scope["state"]["begin_work"] = begin
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        if self.public:
            return answer
        known = {field.alias for field in self.dependant.query_params}

        async def read_and_answer(request: Request) -> Response:
            if unknown := set(request.query_params) - known:
                place = "put it into the body" if self.body_field else f"there is {', '.join(sorted(known)) or 'none'}"
                raise ApiError("invalid_request", f"{_shown(unknown)}: no such parameter in the URL; {place}.")
            if self.body_field is not None:
                limits = request.app.state.gate.limits
                request = _Read(request, await read_values(request, limits, request.state.watched))
            request.state.begin_work()
            return await answer(request)

        return read_and_answer


class _Read(Request):
    """A request whose body has been read: to FastAPI it is JSON, whatever it was."""

    def __init__(self, request: Request, values: dict[str, Any]) -> None:
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
        super().__init__(scope, request.receive)
        self._values = values

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self._values


def _shown(names: set[str]) -> str:
    return ascii(min(names)[:40]).strip("'")
