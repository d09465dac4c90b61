"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict

from starlette.datastructures import Headers

from lora_diffusion.serving.config import AccessConfig
from serve.problems import ApiError

MAX_CALLERS = 10_000


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


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
