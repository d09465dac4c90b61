"""Who may ask, how often, how many at a time, and how slowly."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import os
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.serving.config import AccessConfig, LimitsConfig
from lora_diffusion.serving.messages import Owner

MAX_CALLERS = 10_000
UPLOADS_FOR_EACH = 4  # bodies that may arrive, for each request that may be worked on
SLOW_SECONDS, SLOW_BODIES = (
    1.0,
    8,
)  # a body is slow after that long; so many of one caller may be, others end as long after
FORWARDED = re.compile(r"^(?:\[([^]]*)\](?::\d+)?|([^:]*):\d+)$")  # an address with its port
DELETION_TOKEN, TOKEN = "X-Deletion-Token", re.compile("[0-9a-f]{32,64}")
WRONG_KEYS = 10  # of an address: at once, and a minute


def read_keys(config: AccessConfig) -> list[bytes]:
    """Hashes of the keys; none if neither the variable is set nor a file named. Raises ValueError if those hold no usable key."""
    keys: list[bytes] = []
    for source, text in _texts_of_keys(config):
        found = [key.strip() for key in re.split("[,\n]", text) if key.strip()]
        if not found:
            raise ValueError(
                f"{source} is set, but holds no key: give keys with commas between them, or unset it to let everybody in"
            )
        if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
            raise ValueError(f"{source} holds a key that no header can carry: use ASCII without spaces")
        keys += map(_hash, found)
    return keys


def _texts_of_keys(config: AccessConfig) -> Iterator[tuple[str, str]]:
    """Where keys stand, and what stands there."""
    if config.api_keys_env in os.environ:
        yield config.api_keys_env, os.environ[config.api_keys_env]
    if config.api_keys_file is not None:
        try:
            yield "access.api_keys_file", Path(config.api_keys_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"access.api_keys_file {config.api_keys_file} cannot be read: {error}") from None


def refuse_open_door(config: AccessConfig, host: str) -> None:
    """Raises ValueError where everybody in the network could ask, and nobody has said that they may."""
    if not (config.open or is_loopback(host) or read_keys(config)):
        raise ValueError(
            f"it would listen on {host} and let everybody in: give keys ({config.api_keys_env}, or access.api_keys_file), "
            "listen on 127.0.0.1, or say access.open=true if everybody in this network may use it"
        )


@lru_cache(maxsize=1024)
def is_address(host: str) -> bool:
    """Whether it is an IP address, or this machine's name for itself: names that no DNS server can point elsewhere."""
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine to itself alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def client_address(scope: Scope, headers: Headers, proxies: int) -> str:
    """Where a request comes from: as the last but `proxies` - 1 of X-Forwarded-For, which that many proxies in front wrote.

    Without proxies the header is a stranger's word. uvicorn believes it from this machine, as HAProxy is there, and has put
    it into the place of the peer's address: that is undone. Of IPv6 it is the network, as a client has all of its addresses.
    """
    peer = str((scope.get("client") or ("?", 0))[0])
    lines = headers.getlist("x-forwarded-for")
    if not lines:
        return _network(peer)
    told = [FORWARDED.sub(r"\1\2", entry.strip()) for entry in ",".join(lines).split(",")]
    if proxies:
        return _network(told[-proxies] if proxies <= len(told) else peer)
    return "127.0.0.1" if peer in told else _network(peer)


@lru_cache(maxsize=4096)
def _network(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


class Buckets:
    """A token bucket for each caller: `burst` at once, then `per_minute`."""

    def __init__(self, per_minute: float, burst: float) -> None:
        self._rate, self._burst = per_minute / 60, burst
        self._tokens: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # caller -> tokens, since when

    def wait(self, caller: bytes) -> int:
        """Seconds until it may take one, 0 for now."""
        tokens = self._now(caller)[0]
        return 0 if tokens >= 1 else math.ceil((1 - tokens) / self._rate)

    def take(self, caller: bytes) -> None:
        tokens, now = self._now(caller)
        self._tokens[caller] = (max(0.0, tokens - 1), now)
        self._tokens.move_to_end(caller)
        while len(self._tokens) > MAX_CALLERS:
            self._tokens.popitem(last=False)

    def _now(self, caller: bytes) -> tuple[float, float]:
        now = time.monotonic()
        tokens, since = self._tokens.get(caller, (self._burst, now))
        return min(self._burst, tokens + (now - since) * self._rate), now


class Access:
    """Keys, compared by their hash in constant time; how often each caller may ask, and each address be wrong."""

    def __init__(self, config: AccessConfig, metrics: Metrics) -> None:
        self._keys = read_keys(config)
        self._metrics = metrics
        self._per_minute = config.requests_per_minute
        self._requests = Buckets(config.requests_per_minute, config.burst)
        self._wrong = Buckets(WRONG_KEYS, WRONG_KEYS)
        self._right: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()  # address and key

    def check(self, headers: Headers, address: str) -> Owner:
        """Whose the LoRAs of this request are. Raises ApiError for a wrong key, and for a caller that asks too often."""
        caller = _hash(address)
        if self._keys:
            caller = self._with_key(headers, caller)
        if self._per_minute:
            if wait := self._requests.wait(caller):
                raise _too_often(f"More than {self._per_minute:g} requests a minute", wait)
            self._requests.take(caller)
        return Owner(key=caller.hex()[:32]) if self._keys else Owner(token=_deletion_token(headers))

    def _with_key(self, headers: Headers, address: bytes) -> bytes:
        """The key's hash. Who was let in before is let in again, however many wrong ones come from the same address."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        caller = _hash(key)
        if (address, caller) in self._right:
            self._right.move_to_end((address, caller))
            return caller
        if wait := self._wrong.wait(address):
            raise _too_often("Too many wrong keys came from this address", wait)
        if not any(hmac.compare_digest(caller, known) for known in self._keys):
            if key:
                self._wrong.take(address)
                self._metrics.wrong_keys.inc()
            raise ApiError("unauthorized", headers={"WWW-Authenticate": "Bearer"})
        self._right[address, caller] = None
        while len(self._right) > MAX_CALLERS:
            self._right.popitem(last=False)
        return caller


def _deletion_token(headers: Headers) -> str:
    """The caller's own, so that what it makes twice it deletes once; else a new one. Raises ApiError for one that is too weak."""
    given = headers.get(DELETION_TOKEN)
    if given is None:
        return secrets.token_hex(16)
    if not TOKEN.fullmatch(given):
        raise ApiError("invalid_request", f"{DELETION_TOKEN} is 32 to 64 hexadecimal digits, drawn at random.")
    return given


def _too_often(what: str, wait: int) -> ApiError:
    return ApiError("rate_limited", f"{what}. Try again in {wait} s.", headers={"Retry-After": str(wait)})


class SlowBodies:
    """Ends bodies that arrive slowly, where too many of one caller do: they would fill all the room of the proxy in front."""

    def __init__(self) -> None:
        self._arriving: Counter[str] = Counter()

    @contextmanager
    def watched(self, caller: str, timeout: asyncio.Timeout) -> Iterator[None]:
        """While a body of `caller` arrives; `timeout` ends it."""
        slow = False

        def look() -> None:
            nonlocal slow
            if self._arriving[caller] >= SLOW_BODIES:
                timeout.reschedule(
                    loop.time() + SLOW_SECONDS
                )  # what is there already is still read, if the loop was busy
            else:
                slow = True
                self._arriving[caller] += 1

        loop = asyncio.get_running_loop()
        timer = loop.call_later(SLOW_SECONDS, look)
        try:
            yield
        finally:
            timer.cancel()
            self._arriving[caller] -= slow
            if not self._arriving[caller]:
                del self._arriving[caller]


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
