"""What every request passes before its route, outermost first. Each layer does one thing."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
import traceback
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_diffusion.endpoint.access import is_address
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.problems import ApiError, as_problem
from lora_diffusion.serving.config import LimitsConfig
from lora_diffusion.serving.messages import deadline_in

log = logging.getLogger("lora_diffusion.serve")
HOST_PORT = re.compile(r":\d*$")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
TIMEOUT = "X-Request-Timeout-Seconds"
PROXY_SECONDS = 0.25  # for the way back through Serve's proxy, on a busy machine
GRACE_SECONDS = 2.0  # an answer that has begun says itself that its time is up; this is for one that hangs
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",  # nearly all answers are of a person; what is not says so
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Layer:
    """ASGI middleware for HTTP: `http` answers, everything else passes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.http if scope["type"] == "http" else self.app)(scope, receive, send)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


def at_start(send: Send, look: Callable[[Message], None]) -> Send:
    """`send` that shows the message with status and headers to `look` first."""

    async def looked(message: Message) -> None:
        if message["type"] == "http.response.start":
            look(message)
        await send(message)

    return looked


class RequestId(Layer):
    """`request_id` in the request's state, and in X-Request-Id of the answer (echo; Serve's proxies do that themselves)."""

    def __init__(self, app: ASGIApp, echo: bool) -> None:
        super().__init__(app)
        self._echo = echo

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        def echo(message: Message) -> None:
            MutableHeaders(scope=message)["X-Request-Id"] = request_id

        await self.app(scope, receive, at_start(send, echo) if self._echo else send)


class Log(Layer):
    """One line for each request, and its metrics. Routes tell their path by `route` in the request's state."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = [499]  # the client left
        try:
            await self.app(scope, receive, at_start(send, lambda message: status.append(message["status"])))
        finally:
            elapsed = time.perf_counter() - started
            route = scope["state"].get("route", "other")
            self._metrics.answered(route, status[-1], elapsed)
            line = {"event": "request", "request_id": scope["state"]["request_id"], "method": scope["method"]}
            log.info(json.dumps(line | {"route": route, "status": status[-1], "seconds": round(elapsed, 4)}))


class FixedHeaders(Layer):
    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        def add(message: Message) -> None:
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)

        await self.app(scope, receive, at_start(send, add))


class Errors(Layer):
    """What is raised below becomes a problem document; errors of ours are noted: where, not what was sent."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig, metrics: Metrics) -> None:
        super().__init__(app)
        self._retry_after_seconds = limits.retry_after_seconds
        self._metrics = metrics

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: list[Message] = []
        request_id = scope["state"]["request_id"]
        try:
            await self.app(scope, receive, at_start(send, begun.append))
        except ClientDisconnect:
            return  # nobody is left to be told; `Log` notes status 499
        except Exception as error:
            problem = as_problem(error, self._retry_after_seconds)
            if problem is None:
                frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
                line = {"event": "error", "request_id": request_id, "error": type(error).__name__, "frames": frames}
                log.error(json.dumps(line))
                problem = ApiError("internal_error")
            self._metrics.problems.labels(problem.reason).inc()
            if not begun:
                await problem.response(request_id)(scope, receive, send)


class Site(Layer):
    """Refuses what a page of another site could make a browser send: under a name of its own (DNS rebinding), or from itself.

    names: under which the server may be asked, besides addresses and localhost; empty: under any.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], origins: Sequence[str]) -> None:
        super().__init__(app)
        self._names = frozenset(name.lower() for name in names)
        self._origins = origins

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = HOST_PORT.sub("", host)
        if host and self._names and not (self._names & {name, "*"} or is_address(name)):
            raise ApiError(
                "wrong_host", f"This server does not answer to {name[:80]!r}. Add the name to access.allowed_hosts."
            )
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in SAFE_METHODS and not self._known(origin, host):
            raise ApiError(
                "foreign_origin",
                f"A page of {origin[:80]!r} may not ask {host[:80]!r}. Add it to access.cors_origins, or ask without a browser.",
            )
        await self.app(scope, receive, send)

    def _known(self, origin: str, host: str) -> bool:
        """Whether it is our own page, whose scheme may be another where a proxy ends TLS, or one that may ask."""
        return origin.partition("://")[2].lower() == host or origin in self._origins or "*" in self._origins


class Deadline(Layer):
    """`deadline` in the request's state, and an end to what takes longer."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig) -> None:
        super().__init__(app)
        self._limits = limits

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._seconds(Headers(scope=scope).get(TIMEOUT))
        scope["state"]["deadline"] = deadline_in(seconds)
        async with asyncio.timeout(seconds) as timeout:

            def begun(message: Message) -> None:
                end = timeout.when()
                if end is not None and not timeout.expired():
                    timeout.reschedule(end + GRACE_SECONDS)

            await self.app(scope, receive, at_start(send, begun))

    def _seconds(self, asked: str | None) -> float:
        """A little less than the caller waits: Serve's proxies know the header too, and would answer first, in plain text."""
        if asked is None:
            return self._limits.default_seconds
        try:
            seconds = float(asked)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            message = "is not a number of seconds above 0"
            raise ApiError("invalid_request", f"{TIMEOUT} {message}.", errors=[{"where": TIMEOUT, "message": message}])
        return min(seconds - min(max(0.05 * seconds, PROXY_SECONDS), 0.5 * seconds), self._limits.max_seconds)


class Lenient(Layer):
    """HEAD is GET without the body, and one slash at the end of a path counts for nothing."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        root, path = scope.get("root_path", "").rstrip("/"), scope["path"]
        if root and path == root and scope["method"] in ("GET", "HEAD"):  # the links of the page are relative
            await RedirectResponse(f"{root}/")(scope, receive, send)
            return
        asked = dict(scope)
        if len(path) > len(root) + 1:
            asked["path"] = path.removesuffix("/")
        if scope["method"] == "HEAD":
            asked["method"] = "GET"
        await self.app(asked, receive, _without_body(send) if scope["method"] == "HEAD" else send)


def _without_body(send: Send) -> Send:
    async def bare(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return bare
