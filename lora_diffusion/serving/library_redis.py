"""LoRAs in a Redis, for fleets: every gateway and decoder asks it directly, and none of them holds anything.

One hash for each LoRA, which Redis itself removes when its time is up: `code` and `vector` (bytes of `kept`), and `t:HASH` for each
deletion token. A second key says for as long again what became of it: its end as Unix time, or "deleted".
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from lora_diffusion.extras import needs
from lora_diffusion.serving.config import LibraryConfig
from lora_diffusion.serving.errors import ServingError, store_unavailable
from lora_diffusion.serving.kept import (
    DELETED,
    EVICTED,
    EXPIRED,
    Kept,
    ago,
    from_bytes,
    hashed,
    not_yours,
    to_bytes,
    unknown,
)
from lora_diffusion.serving.messages import LoRARecord

log = logging.getLogger("lora_diffusion.serve")
T = TypeVar("T")
PREFIX = "lora-diffusion:"
TOKEN = "t:"
DELETE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 'none' end
local makers = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], 'code') - redis.call('HEXISTS', KEYS[1], 'vector')
if makers > 0 then
  if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 'not_yours' end
  if makers > 1 then return 'left' end
end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], 'deleted', 'PX', ARGV[2])
return 'deleted'
"""


class RedisLibrary:
    """config.store: redis://[user@]host[:port][/database], or rediss:// for TLS. Connects when it is first asked."""

    def __init__(self, config: LibraryConfig) -> None:
        with needs("redis"):
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        self._seconds, self._ttl_ms = config.store_seconds, max(1, round(1000 * config.ttl_seconds))
        self._ttl_seconds = config.ttl_seconds
        self._errors = (RedisError, OSError, TimeoutError)
        # one more try for a connection that a restarted Redis has closed; all that is asked may be asked twice
        self._redis: Any = Redis.from_url(
            config.store,
            password=os.environ.get(config.password_env) or None,
            socket_timeout=config.store_seconds,
            socket_connect_timeout=config.store_seconds,
            retry=Retry(NoBackoff(), 1),
        )

    async def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        parts = {"code": replace(record, vector_N=None), "vector": replace(record, code=None)}
        fields: dict[str, bytes] = {}
        for name, part in parts.items():
            if part.nbytes:
                fields[name] = to_bytes(Kept(part, 0.0))
        if token:
            fields[TOKEN + hashed(token)] = b""
        key, was = _keys(lora_id)
        end = time.time() + self._ttl_seconds

        async def work() -> None:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping=fields)
                pipe.pexpire(key, self._ttl_ms)
                pipe.set(was, repr(end), px=2 * self._ttl_ms)
                await pipe.execute()

        await self._ask(work)

    async def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora", "store_unavailable"."""
        key, was = _keys(lora_id)

        async def work() -> tuple[bytes | None, list[bytes | None], int]:
            async with self._redis.pipeline(transaction=False) as pipe:  # a full Redis would refuse a transaction
                pipe.get(was)
                pipe.hmget(key, ["code", "vector"])
                pipe.pttl(key)
                end, fields, left_ms = await pipe.execute()
                return end, fields, left_ms

        end, fields, left_ms = await self._ask(work)
        record = LoRARecord()
        for data in filter(None, fields):
            try:
                record = record.completed(from_bytes(data).record or LoRARecord())
            except ValueError as error:
                log.error(json.dumps({"event": "store", "error": str(error)}))
                raise unknown("cannot be read in the store") from None
        if record.nbytes:
            return replace(record, expires_in=max(0, left_ms) / 1000)
        if end is None:
            raise unknown("", await self._restarted())
        raise unknown(DELETED if end == b"deleted" else EXPIRED if float(end) <= time.time() + 1 else EVICTED)

    async def delete(self, lora_id: str, token: str = "") -> bool:
        """Whether there was one. Raises ServingError "not_yours", "store_unavailable"."""
        key, was = _keys(lora_id)
        answer = await self._ask(lambda: self._redis.eval(DELETE, 2, key, was, TOKEN + hashed(token), self._ttl_ms))
        if answer == b"not_yours":
            raise not_yours()
        return bool(answer != b"none")

    async def stats(self) -> dict[str, Any]:
        return {}

    async def ready(self) -> bool:
        """Raises ServingError "store_unavailable"."""
        await self._ask(self._redis.ping)
        return True

    async def _restarted(self) -> str:
        try:
            up = float((await self._ask(lambda: self._redis.info("server")))["uptime_in_seconds"])
        except (ServingError, KeyError):
            return ""
        return f"The store was started {ago(up)} ago: what is older may be lost." if up < self._ttl_seconds else ""

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._seconds):
                return await work()
        except self._errors as error:
            raise store_unavailable(error) from error


def _keys(lora_id: str) -> tuple[str, str]:
    return f"{PREFIX}{lora_id}", f"{PREFIX}{lora_id}:was"
