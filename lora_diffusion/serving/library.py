"""LoRAs kept for a while, each under the hash of what is kept of it.

That is the code of 2 KB, from which the Decoder makes the same vector again in a few milliseconds; of an upload, the vector.
The same code has the same id, whoever asks; an id cannot be guessed from another. Who uploads somebody's file gets an id of the
file, and not the code behind it. Where several people made the same one, it stays until the last of them has deleted it. All go when their time is up, and a deletion is immediate.

Here in memory: least recently used ones make room, nothing is written to disk, and a restart loses all. `library_redis` and
`library_objects` keep them outside of the process.

Axes: N length of a LoRA vector.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.kept import DELETED, EVICTED, EXPIRED, Kept, ago, put_on, unknown
from lora_diffusion.serving.messages import LoRARecord
from lora_diffusion.serving.stages import LibraryStage

REMEMBERED = 10_000  # ids of LoRAs that were here


def content_id(record: LoRARecord, layout_id: str) -> str:
    """32 hex digits of SHA-256: over a code with its synthesiser and scale, or else over the vector. layout_id: of either."""
    if record.code is not None:
        values, of = record.code.values_Z, f"code:{record.code.model_id}:{record.deviation_scale}"
    else:
        assert record.vector_N is not None
        values, of = record.vector_N, f"vector:{len(record.vector_N)}"
    digest = hashlib.sha256(f"{layout_id}:{of}:".encode())
    digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()[:32]


def open_library(config: ServeConfig) -> LibraryStage:
    """Where `library.store` says. Touches nothing yet. Raises MissingExtra, or ValueError."""
    store = config.library.store
    if store.startswith(("redis://", "rediss://")):
        from lora_diffusion.serving.library_redis import RedisLibrary

        return RedisLibrary(config.library)
    if store:
        from lora_diffusion.serving.library_objects import ObjectLibrary

        return ObjectLibrary(config.library)
    return Library(config)


class LoRALibrary:
    """A bounded cache. `max_bytes` counts codes, vectors and tokens; `ttl_seconds` run from the last time that a LoRA was put."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._started = clock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the one that was asked for last at the end
        self._ends: deque[tuple[float, str]] = (
            deque()
        )  # of all puts; every LoRA has the same time, so the first end first
        self._gone: OrderedDict[str, str] = OrderedDict()  # id -> why
        self._bytes = 0

    def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        """What is known of it already stays known. token: of who made it."""
        self.sweep()
        before, now = self._kept.get(lora_id), self._clock()
        self._delete(lora_id)
        entry = self._kept[lora_id] = put_on(before, record, token, now + self._ttl_seconds, now)
        self._ends.append((entry.expires, lora_id))
        self._gone.pop(lora_id, None)
        self._bytes += entry.nbytes
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            self._delete(next(iter(self._kept)), EVICTED)

    def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        now = self._clock()
        if (entry := self._kept.get(lora_id)) and entry.expires > now:
            self._kept.move_to_end(lora_id)
            return entry.found(now)
        self._delete(lora_id, EXPIRED)
        lost, here = "", now - self._started
        if here < self._ttl_seconds:  # after that, what was made before has expired anyway
            lost = f"If it was made more than {ago(here)} ago, it was lost when this part of the service restarted."
        raise unknown(self._gone.get(lora_id, ""), lost)

    def delete(self, lora_id: str, token: str = "") -> bool:
        """Whether there was one. It stays for others who made it, too. Raises ServingError "not_yours" without one of their tokens."""
        entry = self._kept.get(lora_id)
        if entry is None:
            return False
        if left := entry.without(token):
            self._kept[lora_id] = left
            self._bytes += left.nbytes - entry.nbytes
        else:
            self._delete(lora_id, DELETED)
        return True

    def _delete(self, lora_id: str, why: str = "") -> None:
        entry = self._kept.pop(lora_id, None)
        if entry is not None:
            self._bytes -= entry.nbytes
            self._gone[lora_id] = why
            while len(self._gone) > REMEMBERED:
                self._gone.popitem(last=False)

    def sweep(self) -> None:
        """Forget what has expired. Takes no longer for what has not."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            end, lora_id = self._ends.popleft()
            if (entry := self._kept.get(lora_id)) and entry.expires == end:  # else it was put again, or is gone
                self._delete(lora_id, EXPIRED)

    def stats(self) -> dict[str, Any]:
        return {"loras": len(self._kept), "bytes": self._bytes, "max_bytes": self._max_bytes}


class Library:
    """LoRALibrary as a service: the one place that holds these LoRAs."""

    def __init__(self, config: ServeConfig) -> None:
        self._library = LoRALibrary(config.library.max_bytes, config.library.ttl_seconds)

    async def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        self._library.put(lora_id, record, token)

    async def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        return self._library.get(lora_id)

    async def delete(self, lora_id: str, token: str = "") -> bool:
        """Whether there was one. Raises ServingError "not_yours"."""
        return self._library.delete(lora_id, token)

    async def stats(self) -> dict[str, Any]:
        self.check_health()
        return self._library.stats()

    def check_health(self) -> None:
        """Called every few seconds by Serve: what has expired leaves memory although nobody asks for it."""
        self._library.sweep()

    async def ready(self) -> bool:
        return True


class ShardedLibrary:
    """Several libraries as one; an id, which is a hash, lies in the one that its first digits say."""

    def __init__(self, shards: Sequence[LibraryStage]) -> None:
        self._shards = shards

    def _of(self, lora_id: str) -> LibraryStage:
        return self._shards[int(lora_id[:8], 16) % len(self._shards)]

    async def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        await self._of(lora_id).put(lora_id, record, token)

    async def get(self, lora_id: str) -> LoRARecord:
        return await self._of(lora_id).get(lora_id)

    async def delete(self, lora_id: str, token: str = "") -> bool:
        return await self._of(lora_id).delete(lora_id, token)

    async def stats(self) -> dict[str, Any]:
        found = await asyncio.gather(*(shard.stats() for shard in self._shards))
        return {key: sum(stats[key] for stats in found) for key in found[0]}

    async def ready(self) -> bool:
        return all(await asyncio.gather(*(shard.ready() for shard in self._shards)))
