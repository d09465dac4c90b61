"""The stages as those see them who call them: the services themselves in one process, or `endpoint.remote` on a cluster.

Every method may be repeated: it answers the same, and what it keeps it keeps once. `deadline` and axes: messages.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from lora_diffusion.serving.batcher import Timing
from lora_diffusion.serving.messages import (
    Code,
    Decoded,
    DecodeTask,
    DrawnImage,
    DrawTask,
    Floats,
    FoundFaces,
    LatentTask,
    LoRARecord,
    Owner,
    Photo,
    Progress,
)


class Stage(Protocol):
    async def ready(self) -> bool: ...


class EmbedderStage(Stage, Protocol):
    async def detect(self, photo: Photo, deadline: float) -> tuple[FoundFaces, Timing]: ...
    async def similarity(self, pixels_HWC: Photo, reference_C: Floats, deadline: float) -> float: ...


class DenoiserStage(Stage, Protocol):
    async def sample(self, task: LatentTask, deadline: float) -> tuple[Code, Timing]: ...
    async def edit(self, code: Code, edits: Mapping[str, float]) -> Code: ...
    async def interpolate(self, a: Code, b: Code, positions: Sequence[float]) -> list[Code]: ...
    async def neighbour(self, embedding_C: Floats) -> Code | None: ...
    async def describe(self) -> dict[str, Any]: ...


class DecoderStage(Stage, Protocol):
    async def decode(self, task: DecodeTask, deadline: float) -> tuple[Decoded, Timing]: ...
    async def accept(self, data: bytes, format: str | None, owner: Owner) -> Decoded: ...
    async def vector(self, lora_id: str, record: LoRARecord | None, deadline: float) -> Floats: ...
    async def file(self, lora_id: str, format: str, deadline: float) -> bytes: ...


class RendererStage(Stage, Protocol):
    def draw(self, task: DrawTask, deadline: float) -> AsyncGenerator[Progress | DrawnImage | Timing, None]: ...
    async def describe(self) -> dict[str, Any]: ...


class LibraryStage(Stage, Protocol):
    async def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None: ...
    async def get(self, lora_id: str) -> LoRARecord: ...
    async def delete(self, lora_id: str, token: str = "") -> bool: ...
    async def stats(self) -> dict[str, Any]: ...
