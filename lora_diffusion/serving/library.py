"""LoRAs kept for a while, each under the hash of its content.

The same vector has the same id, whoever asks; an id cannot be guessed from another. Least recently used ones make room,
all go when their time is up, and a deletion is immediate. Nothing is written to disk.

Axes: N length of a LoRA vector, Z code of the synthesiser.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError

Floats = NDArray[np.float32]
ID_PATTERN = r"^[0-9a-f]{32}$"
EXPECTED_SECONDS = 60.0  # so long a LoRA may be on its way, and a deletion is remembered
WAIT_SECONDS = 5.0  # so long a question for it waits


@dataclass(frozen=True)
class LoRARecord:
    """One person's LoRA. vector_N float32; code_Z and model_id: the latent it was decoded from, None for an upload."""

    vector_N: Floats
    code_Z: Floats | None = None
    model_id: str | None = None

    @property
    def nbytes(self) -> int:
        return self.vector_N.nbytes + (0 if self.code_Z is None else self.code_Z.nbytes)


def content_id(vector_N: Floats, layout_id: str) -> str:
    """32 hex digits of SHA-256 over the layout and the vector's bytes."""
    digest = hashlib.sha256(f"{layout_id}:{len(vector_N)}:".encode())
    digest.update(np.ascontiguousarray(vector_N, "<f4").tobytes())
    return digest.hexdigest()[:32]


class LoRALibrary:
    """A bounded cache. `max_bytes` counts the vectors; `ttl_seconds` run from the last time that a LoRA was put."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._records: OrderedDict[str, tuple[LoRARecord, float]] = OrderedDict()
        self._bytes = 0

    def put(self, lora_id: str, record: LoRARecord) -> None:
        self.sweep()
        self.delete(lora_id)
        self._records[lora_id] = (record, self._clock() + self._ttl_seconds)
        self._bytes += record.nbytes
        while self._bytes > self._max_bytes and len(self._records) > 1:
            self.delete(next(iter(self._records)))

    def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        record, expires = self._records.get(lora_id, (None, 0.0))
        if record is None or expires <= self._clock():
            self.delete(lora_id)
            shown = lora_id if re.match(ID_PATTERN, lora_id) else "of this form"
            raise ServingError(
                "unknown_lora",
                f"There is no LoRA {shown} here. They are kept for {self._ttl_seconds:.0f} s, or until room is needed: "
                "make it again from the photo, or upload the file that you have.",
            )
        self._records.move_to_end(lora_id)
        return record

    def delete(self, lora_id: str) -> bool:
        """Whether there was one."""
        entry = self._records.pop(lora_id, None)
        if entry is None:
            return False
        self._bytes -= entry[0].nbytes
        return True

    def sweep(self) -> None:
        """Forget what has expired."""
        now = self._clock()
        for lora_id in [key for key, (_, expires) in self._records.items() if expires <= now]:
            self.delete(lora_id)

    def stats(self) -> dict[str, Any]:
        return {"loras": len(self._records), "bytes": self._bytes, "max_bytes": self._max_bytes}


@dataclass
class _Coming:
    """A LoRA whose `put` is on the way."""

    wanted: bool = True  # False: deleted meanwhile
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Library:
    """The one place that holds LoRAs: LoRALibrary as a service.

    A vector is far larger than its id, so whoever makes one may say by `expect` that it comes, answer its own caller, and
    `put` it meanwhile: who asks for it in between waits, and a deletion in between holds.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._library = LoRALibrary(config.library.max_bytes, config.library.ttl_seconds)
        self._coming: dict[str, _Coming] = {}

    async def expect(self, lora_id: str) -> None:
        coming = self._coming.setdefault(lora_id, _Coming())
        coming.wanted = True
        asyncio.get_running_loop().call_later(EXPECTED_SECONDS, self._arrived, lora_id, coming)

    async def put(self, lora_id: str, record: LoRARecord) -> None:
        coming = self._coming.get(lora_id)
        if coming is None or coming.wanted:
            self._library.put(lora_id, record)
        if coming is not None:
            self._arrived(lora_id, coming)

    def _arrived(self, lora_id: str, coming: _Coming) -> None:
        """Or it never will."""
        coming.over.set()
        if self._coming.get(lora_id) is coming:
            del self._coming[lora_id]

    async def get(self, lora_id: str) -> LoRARecord:
        coming = self._coming.get(lora_id)
        if coming is not None and coming.wanted:
            with suppress(TimeoutError):
                await asyncio.wait_for(coming.over.wait(), WAIT_SECONDS)
        return self._library.get(lora_id)

    async def delete(self, lora_id: str) -> bool:
        """Whether there was one, or one was on its way."""
        coming = self._coming.get(lora_id)
        expected = coming is not None and coming.wanted
        if coming is not None:
            coming.wanted = False
            coming.over.set()
        return self._library.delete(lora_id) or expected

    async def stats(self) -> dict[str, Any]:
        self.check_health()
        return self._library.stats()

    def check_health(self) -> None:
        """Called every few seconds by Serve: what has expired leaves memory although nobody asks for it."""
        self._library.sweep()

    async def ready(self) -> bool:
        return True
