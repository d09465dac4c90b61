"""Who may ask, how often, and how many at a time."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers

from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.serving.config import AccessConfig, LimitsConfig

MAX_CALLERS = 10_000
UPLOADS_FOR_EACH = 4  # bodies that may arrive, for each request that may be worked on


def read_keys(config: AccessConfig) -> list[bytes]:
    """Hashes of the keys; none if the variable is not set. Raises ValueError for one that is set and holds no usable key."""
    text = os.environ.get(config.api_keys_env)
    if text is None:
        return []
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ValueError(
            f"{config.api_keys_env} is set, but holds no key: set it to keys with commas between them, or unset it to let "
            "everybody in"
        )
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError(f"{config.api_keys_env} holds a key that no header can carry: use ASCII without spaces")
    return [_hash(key) for key in keys]


class Access:
    """Keys (compared by their hash, in constant time), and a token bucket for each caller."""

    def __init__(self, config: AccessConfig) -> None:
        self._keys = read_keys(config)
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
                raise ApiError("unauthorized", headers={"WWW-Authenticate": "Bearer"})
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


class AdmissionControl:
    """How much is let in: requests that are worked on, and, as slow uploads must not keep others out, more that arrive."""

    def __init__(self, limits: LimitsConfig, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._present = 0
        self._at_work = 0

    @contextmanager
    def admitted(self) -> Iterator[Callable[[], None]]:
        """Lets one request in; what it yields is called when its body has been read. Both raise ApiError if all is full."""
        working = False

        def begin() -> None:
            nonlocal working
            self._refuse_if(self._at_work >= self._limits.max_in_flight)
            working = True
            self._change(1)

        self._refuse_if(
            self._at_work >= self._limits.max_in_flight
            or self._present >= UPLOADS_FOR_EACH * self._limits.max_in_flight
        )
        self._present += 1
        try:
            yield begin
        finally:
            self._present -= 1
            self._change(-working)

    def _change(self, by: int) -> None:
        self._at_work += by
        self._metrics.in_flight.set(self._at_work)

    def _refuse_if(self, full: bool) -> None:
        if full:
            raise ApiError(
                "overloaded",
                f"{self._at_work} requests are being worked on already. Try again a little later.",
                headers={"Retry-After": f"{max(1, round(self._limits.retry_after_seconds))}"},
            )


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
