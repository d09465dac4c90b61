"""What stands before every route: request id, key, rate, bounded work, deadline, and one line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import time
import traceback
from collections import OrderedDict
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_diffusion.serving.config import AccessConfig, ServeConfig
from serve.metrics import Metrics
from serve.problems import ApiError, as_problem

log = logging.getLogger("lora_diffusion.serve")
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
GRACE_SECONDS = 2.0  # the stages know the deadline and answer for themselves; this is for one that hangs
MAX_CALLERS = 10_000
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class Guard:
    """ASGI middleware. Work is what goes to /v1: it needs a key and room; the page, docs and health need neither."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self._app = app
        self._limits = config.limits
        self._access = Access(config.access)
        self._metrics = metrics
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else secrets.token_hex(8)
        started = time.perf_counter()
        answer = _Answer(send, request_id)
        seconds = self._seconds(headers)
        scope.setdefault("state", {}).update(request_id=request_id, deadline=time.time() + seconds)
        work = scope["path"].startswith("/v1/")
        try:
            if work:
                self._access.check(headers, (scope.get("client") or ("?", 0))[0])
                if self._in_flight >= self._limits.max_in_flight:
                    raise ApiError(
                        "overloaded",
                        f"{self._in_flight} requests are being worked on already. Try again a little later.",
                        headers={"Retry-After": f"{max(1, round(self._limits.retry_after_seconds))}"},
                    )
            self._in_flight += work
            self._metrics.in_flight.set(self._in_flight)
            try:
                async with asyncio.timeout(seconds + GRACE_SECONDS):
                    await self._app(scope, receive, answer.send)
            finally:
                self._in_flight -= work
                self._metrics.in_flight.set(self._in_flight)
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


class Access:
    """Keys (compared by their hash, in constant time), and a token bucket for each caller."""

    def __init__(self, config: AccessConfig) -> None:
        keys = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",")]
        self._keys = [_hash(key) for key in keys if key]
        self._rate = config.requests_per_minute / 60
        self._burst = float(config.burst)
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # caller -> tokens, since when

    def check(self, headers: Headers, address: str) -> None:
        """Raises ApiError for a wrong key, and for a caller that asks too often."""
        caller = _hash(address)
        if self._keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            caller = _hash(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
            if not any(hmac.compare_digest(caller, known) for known in self._keys):
                raise ApiError(
                    "unauthorized",
                    "This server wants an API key: send it as `Authorization: Bearer KEY`.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._rate:
            self._take(caller)

    def _take(self, caller: bytes) -> None:
        now = time.monotonic()
        tokens, since = self._buckets.pop(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        self._buckets[caller] = (max(0.0, tokens - 1) if tokens >= 1 else tokens, now)
        while len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self._rate)
            raise ApiError(
                "rate_limited",
                f"More than {self._rate * 60:g} requests a minute. Try again in {wait} s.",
                headers={"Retry-After": str(wait)},
            )


def _hash(text: Any) -> bytes:
    return hashlib.sha256(str(text).encode("utf-8", "replace")).digest()
