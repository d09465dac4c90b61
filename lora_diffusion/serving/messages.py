"""What the stages say to each other. Plain arrays and numbers; photos travel as the bytes that came.

Axes: C embedding (512), Z code of the synthesiser, H/W pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import Doubt

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Photo: TypeAlias = bytes | Pixels
"""The bytes of a file, or uint8 RGB (H, W, 3)."""


class Deadline(float):
    """When a request's time is up, by `time.monotonic()` of this process.

    On the way to another it is the seconds that are left: machines' clocks differ, and jump.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return deadline_in, (self - time.monotonic(),)


def deadline_in(seconds: float) -> Deadline:
    return Deadline(time.monotonic() + seconds)


FILE_NAMES = {
    "diffusers": ("pytorch_lora_weights.safetensors", "application/octet-stream"),
    "peft": ("peft_adapter.zip", "application/zip"),
    "kohya": ("lora.safetensors", "application/octet-stream"),
    "vector": ("vector.safetensors", "application/octet-stream"),
    "latent": ("latent.safetensors", "application/octet-stream"),
}
"""LoRA file format -> (name of the download, media type)."""


@dataclass(frozen=True)
class FoundFace:
    """box (x1, y1, x2, y2), keypoints (5, 2) in px; embedding_C of unit length."""

    box: Floats
    keypoints: Floats
    score: float
    embedding_C: Floats


@dataclass(frozen=True)
class FoundFaces:
    """The faces of one photo of width x height px, largest first; doubt: why there is none."""

    width: int
    height: int
    faces: tuple[FoundFace, ...]
    doubt: Doubt | None = None


@dataclass(frozen=True)
class LatentTask:
    """One code of the person with embedding_C. None: what the synthesiser's folder recommends."""

    embedding_C: Floats
    seed: int
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Code:
    """A person in the synthesiser's code space. model_id: the synthesiser that it belongs to."""

    values_Z: Floats
    model_id: str
    nearest: float | None = None
    """Cosine of the asked embedding with the nearest one of the corpus, where the synthesiser knows its corpus."""


@dataclass(frozen=True)
class Owner:
    """Whose a LoRA is: of the API key with this hash, or without keys of whoever has the token that came when it was made."""

    key: str = ""
    token: str = ""

    def place(self, lora_id: str) -> str:
        """The name of a LoRA in the library: with keys, each has LoRAs of its own."""
        return f"{lora_id}.{self.key}" if self.key else lora_id


@dataclass(frozen=True)
class DecodeTask:
    code: Code
    deviation_scale: float | None
    """None: what the synthesiser's folder recommends."""
    format: str | None = None
    """Also give the LoRA file in this format."""
    owner: Owner = Owner()


@dataclass(frozen=True)
class LoRARecord:
    """What a LoRA is made from: its code, and how it is decoded. Of an upload: the vector itself, float32. Or both.

    expires_in: seconds until the library that it comes from forgets it.
    """

    code: Code | None = None
    deviation_scale: float | None = None
    vector_N: Floats | None = None
    expires_in: float | None = None

    @property
    def nbytes(self) -> int:
        code = 0 if self.code is None else self.code.values_Z.nbytes
        return code + (0 if self.vector_N is None else self.vector_N.nbytes)

    def completed(self, other: LoRARecord) -> LoRARecord:
        """With what `other` has of the same LoRA, and this one has not."""
        source = other if self.code is None else self
        vector_N = other.vector_N if self.vector_N is None else self.vector_N
        return LoRARecord(source.code, source.deviation_scale, vector_N)


@dataclass(frozen=True)
class Decoded:
    """A LoRA that lies in the library under `lora_id`."""

    lora_id: str
    file: bytes | None = None
    put_seconds: float = 0.0


@dataclass(frozen=True)
class DrawTask:
    """Pictures of one person. Picture i has the seed `seeds[i]`.

    lora_id: its name in the library. lora_scale: of what the LoRA adds to the base model; 0 draws with the base model alone.
    record: of a LoRA that was made for this task, so that the library need not be asked.
    reference_C: the person's embedding, to score the pictures with; None: no scores.
    image_format: "png", "jpeg" or "webp".
    """

    lora_id: str
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    guidance_scale: float
    num_inference_steps: int
    image_format: str = "png"
    lora_scale: float = 1.0
    record: LoRARecord | None = None
    reference_C: Floats | None = None


@dataclass(frozen=True)
class DrawnImage:
    """Picture `index`, encoded. similarity: cosine of its face with the reference, 0 without a face, None unscored."""

    index: int
    data: bytes
    similarity: float | None = None


@dataclass(frozen=True)
class Progress:
    """`done` of `total` denoising steps of a request, over all its pictures."""

    done: int
    total: int
