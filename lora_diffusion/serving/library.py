"""LoRAs kept for a while, each under the hash of its content.

What is kept is the code of 2 KB, from which the Decoder makes the same vector again in a few milliseconds; of an upload, the
vector. The same vector has the same id, whoever asks; an id cannot be guessed from another. Least recently used ones make
room, all go when their time is up, and a deletion is immediate. Nothing is written to disk.

Axes: N length of a LoRA vector.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Floats, LoRARecord

REMEMBERED = 10_000  # ids of LoRAs that were here


def content_id(vector_N: Floats, layout_id: str) -> str:
    """32 hex digits of SHA-256 over the layout and the vector's bytes."""
    digest = hashlib.sha256(f"{layout_id}:{len(vector_N)}:".encode())
    digest.update(np.ascontiguousarray(vector_N, "<f4").tobytes())
    return digest.hexdigest()[:32]


class LoRALibrary:
    """A bounded cache. `max_bytes` counts codes and vectors; `ttl_seconds` run from the last time that a LoRA was put."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._records: OrderedDict[str, tuple[LoRARecord, float]] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()  # id -> why
        self._bytes = 0

    def put(self, lora_id: str, record: LoRARecord) -> None:
        self.sweep()
        self.delete(lora_id)
        self._records[lora_id] = (record, self._clock() + self._ttl_seconds)
        self._gone.pop(lora_id, None)
        self._bytes += record.nbytes
        while self._bytes > self._max_bytes and len(self._records) > 1:
            self.delete(next(iter(self._records)), "had to make room for newer ones")

    def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        record, expires = self._records.get(lora_id, (None, 0.0))
        if record is not None and expires > self._clock():
            self._records.move_to_end(lora_id)
            return record
        self.delete(lora_id, "has expired")
        why = self._gone.get(lora_id)
        what = f"This LoRA {why}." if why else "There is no LoRA with this id here."
        raise ServingError("unknown_lora", f"{what} Make it again.")

    def delete(self, lora_id: str, why: str = "was deleted") -> bool:
        """Whether there was one."""
        entry = self._records.pop(lora_id, None)
        if entry is None:
            return False
        self._bytes -= entry[0].nbytes
        self._gone[lora_id] = why
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        return True

    def sweep(self) -> None:
        """Forget what has expired."""
        now = self._clock()
        for lora_id in [key for key, (_, expires) in self._records.items() if expires <= now]:
            self.delete(lora_id, "has expired")

    def stats(self) -> dict[str, Any]:
        return {"loras": len(self._records), "bytes": self._bytes, "max_bytes": self._max_bytes}


class Library:
    """The one place that holds LoRAs: LoRALibrary as a service."""

    def __init__(self, config: ServeConfig) -> None:
        self._library = LoRALibrary(config.library.max_bytes, config.library.ttl_seconds)

    async def put(self, lora_id: str, record: LoRARecord) -> None:
        self._library.put(lora_id, record)

    async def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        return self._library.get(lora_id)

    async def delete(self, lora_id: str) -> bool:
        """Whether there was one."""
        return self._library.delete(lora_id)

    async def stats(self) -> dict[str, Any]:
        self.check_health()
        return self._library.stats()

    def check_health(self) -> None:
        """Called every few seconds by Serve: what has expired leaves memory although nobody asks for it."""
        self._library.sweep()

    async def ready(self) -> bool:
        return True
