"""What stands before every route: request id, key, rate, bounded work, deadline, and one line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_diffusion.serving.config import LimitsConfig, ServeConfig
from serve.access import Access
from serve.metrics import Metrics
from serve.problems import ApiError, as_problem

log = logging.getLogger("lora_diffusion.serve")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
GRACE_SECONDS = 2.0  # the stages know the deadline and answer for themselves; this is for one that hangs
UPLOADS_FOR_EACH = 4  # bodies that may arrive, for each request that may be worked on
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class Guard:
    """ASGI middleware. Work is what goes to /v1: it needs a key and room; the page, docs and health need neither."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self._app = app
        self._limits = config.limits
        self._access = Access(config.access)
        self._metrics = metrics
        self._room = Room(config.limits, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        started = time.perf_counter()
        answer = _Answer(send, request_id)
        seconds = self._seconds(headers)
        place = _Place(self._room)
        scope.setdefault("state", {}).update(
            request_id=request_id, deadline=time.time() + seconds, take_place=place.take
        )
        work = scope["path"].startswith("/v1/")
        try:
            if work:
                self._access.check(headers, (scope.get("client") or ("?", 0))[0])
                self._room.arrive()
            try:
                async with asyncio.timeout(seconds + GRACE_SECONDS):
                    await self._app(scope, receive, answer.send)
            finally:
                place.leave()
                self._room.present -= work
        except ApiError as refusal:
            await refusal.response(request_id)(scope, receive, answer.send)
        except TimeoutError:
            if not answer.status:
                late = as_problem(TimeoutError(), self._limits.retry_after_seconds)
                assert late is not None
                await late.response(request_id)(scope, receive, answer.send)
        except Exception as error:
            # Where, not what: messages may hold what was sent.
            frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
            line = {"event": "error", "request_id": request_id, "error": type(error).__name__, "frames": frames}
            log.error(json.dumps(line))
            if not answer.status:
                problem = ApiError("internal_error", "An error of ours, noted under this request id. Try again.")
                await problem.response(request_id)(scope, receive, answer.send)
        finally:
            elapsed = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", None) or ("/" if scope["path"] == "/" else "other")
            self._metrics.answered(route, answer.status or 499, elapsed)
            log.info(
                json.dumps(
                    {
                        "event": "request",
                        "request_id": request_id,
                        "method": scope["method"],
                        "route": route,
                        "status": answer.status or 499,
                        "seconds": round(elapsed, 4),
                    }
                )
            )

    def _seconds(self, headers: Headers) -> float:
        """How long the caller waits: X-Request-Timeout-Seconds, a little less than Serve's proxy, which knows it, too."""
        try:
            asked = float(headers.get("x-request-timeout-seconds", ""))
        except ValueError:
            return self._limits.default_seconds
        if not math.isfinite(asked) or asked <= 0:
            return self._limits.default_seconds
        return min(asked * 0.95, self._limits.max_seconds)


class Room:
    """How much is let in: requests that are worked on, and, as slow uploads must not keep others out, more that arrive."""

    def __init__(self, limits: LimitsConfig, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self.present = 0
        self.at_work = 0

    def arrive(self) -> None:
        """Raises ApiError if there is no point in reading the body."""
        if self.at_work >= self._limits.max_in_flight or self.present >= UPLOADS_FOR_EACH * self._limits.max_in_flight:
            raise self._full()
        self.present += 1

    def begin(self) -> None:
        if self.at_work >= self._limits.max_in_flight:
            raise self._full()
        self._change(1)

    def end(self) -> None:
        self._change(-1)

    def _change(self, by: int) -> None:
        self.at_work += by
        self._metrics.in_flight.set(self.at_work)

    def _full(self) -> ApiError:
        return ApiError(
            "overloaded",
            f"{self.at_work} requests are being worked on already. Try again a little later.",
            headers={"Retry-After": f"{max(1, round(self._limits.retry_after_seconds))}"},
        )


class _Place:
    """One request's place at work, from when its body has been read."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._taken = False

    def take(self) -> None:
        """Raises ApiError if there is none."""
        self._room.begin()
        self._taken = True

    def leave(self) -> None:
        if self._taken:
            self._room.end()
            self._taken = False


class _Answer:
    """Sends, and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)
