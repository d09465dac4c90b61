"""LoRAs kept for a while, each under the hash of its content.

What is kept is the code of 2 KB, from which the Decoder makes the same vector again in a few milliseconds; of an upload, the
vector. The same vector has the same id, whoever asks; an id cannot be guessed from another. Where several people made the same
one, it stays until the last of them has deleted it. Least recently used ones make room, all go when their time is up, and a
deletion is immediate. Nothing is written to disk.

Axes: N length of a LoRA vector.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Floats, LoRARecord

REMEMBERED = 10_000  # ids of LoRAs that were here
TOKEN_BYTES = 64


def content_id(vector_N: Floats, layout_id: str) -> str:
    """32 hex digits of SHA-256 over the layout and the vector's bytes."""
    digest = hashlib.sha256(f"{layout_id}:{len(vector_N)}:".encode())
    digest.update(np.ascontiguousarray(vector_N, "<f4").tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Entry:
    """tokens: of all who made it, if it takes one to delete it."""

    record: LoRARecord
    expires: float
    tokens: set[str]

    @property
    def nbytes(self) -> int:
        return self.record.nbytes + TOKEN_BYTES * len(self.tokens)


class LoRALibrary:
    """A bounded cache. `max_bytes` counts codes, vectors and tokens; `ttl_seconds` run from the last time that a LoRA was put."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._records: OrderedDict[str, _Entry] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()  # id -> why
        self._bytes = 0

    def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        """What is known of it already stays known. token: of who made it."""
        self.sweep()
        tokens: set[str] = set()
        if before := self._records.get(lora_id):
            record, tokens = record.completed(before.record), before.tokens
            self._delete(lora_id)
        if token:
            tokens.add(token)
        entry = self._records[lora_id] = _Entry(record, self._clock() + self._ttl_seconds, tokens)
        self._gone.pop(lora_id, None)
        self._bytes += entry.nbytes
        while self._bytes > self._max_bytes and len(self._records) > 1:
            self._delete(next(iter(self._records)), "had to make room for newer ones")

    def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        entry = self._records.get(lora_id)
        if entry is not None and entry.expires > self._clock():
            self._records.move_to_end(lora_id)
            return entry.record
        self._delete(lora_id, "has expired")
        why = self._gone.get(lora_id)
        what = f"This LoRA {why}." if why else "There is no LoRA with this id here."
        raise ServingError("unknown_lora", f"{what} Make it again.")

    def delete(self, lora_id: str, token: str = "") -> bool:
        """Whether there was one. It stays for others who made it, too. Raises ServingError "not_yours" without one of their tokens."""
        entry = self._records.get(lora_id)
        if entry is None:
            return False
        if entry.tokens and token not in entry.tokens:
            raise ServingError(
                "not_yours",
                "This LoRA is deleted with the deletion_token that came when it was made: send X-Deletion-Token.",
            )
        if len(entry.tokens) > 1:
            entry.tokens.remove(token)
            self._bytes -= TOKEN_BYTES
        else:
            self._delete(lora_id, "was deleted")
        return True

    def _delete(self, lora_id: str, why: str = "") -> None:
        entry = self._records.pop(lora_id, None)
        if entry is not None:
            self._bytes -= entry.nbytes
            self._gone[lora_id] = why
            while len(self._gone) > REMEMBERED:
                self._gone.popitem(last=False)

    def sweep(self) -> None:
        """Forget what has expired."""
        now = self._clock()
        for lora_id in [key for key, entry in self._records.items() if entry.expires <= now]:
            self._delete(lora_id, "has expired")

    def stats(self) -> dict[str, Any]:
        return {"loras": len(self._records), "bytes": self._bytes, "max_bytes": self._max_bytes}


class Library:
    """The one place that holds LoRAs: LoRALibrary as a service."""

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
