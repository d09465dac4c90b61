"""The first stage: photos -> faces and their embeddings. Needs no torch.

Axes: B photos, C embedding (512), H/W pixels.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from lora_diffusion.artifacts.identity import read_identity
from lora_diffusion.config import from_dict
from lora_diffusion.faces.apart import LIGHT_PIXELS, SECONDS, is_light, load_photo_within
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.photos import PhotoError, load_photo
from lora_diffusion.faces.search import Faces
from lora_diffusion.serving.batcher import Batcher, Timing
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import deadline_exceeded
from lora_diffusion.serving.messages import Floats, FoundFace, FoundFaces, Photo, Pixels


@dataclass(frozen=True)
class _Decoded:
    """A photo, not a drawn picture: shrunk by `factor`, as the search for faces takes seconds in very many pixels."""

    pixels_HWC: Pixels
    factor: int
    size: tuple[int, int]  # of the photo, height and width

    @classmethod
    def of(cls, pixels_HWC: Pixels) -> _Decoded:
        height, width, _ = pixels_HWC.shape
        factor = math.ceil(math.sqrt(height * width / LIGHT_PIXELS))
        shrunk = np.asarray(Image.fromarray(pixels_HWC).reduce(factor)) if factor > 1 else pixels_HWC
        return cls(shrunk, factor, (height, width))


class FaceStage:
    """Finds and embeds the faces of each photo: the bytes of a file. Of a drawn picture, pixels (H, W, 3), the largest face.

    Raises ValueError if the configuration names another recogniser than the synthesiser was trained with.
    """

    def __init__(self, config: ServeConfig) -> None:
        identity = read_identity(config.synthesizer)
        values = {"threads": config.threads, **config.embedder}
        values["model"] = values.get("model") or identity.recogniser_name
        self._embedder = FaceEmbedder(from_dict(EmbedderConfig, values, "embedder."))
        identity.check_recogniser(self._embedder, f"the synthesiser {config.synthesizer}")
        self._limits = config.limits

    def __call__(self, photos: Sequence[Photo | _Decoded]) -> list[FoundFaces | Exception]:
        """In the order of the photos; a PhotoError in the place of one that cannot be read."""
        answers: list[FoundFaces | Exception] = []
        for photo in photos:
            try:
                answers.append(self._faces(photo))
            except PhotoError as error:
                answers.append(error)
        return answers

    def _faces(self, photo: Photo | _Decoded) -> FoundFaces:
        if isinstance(photo, np.ndarray):
            found, factor = Faces(tuple(self._embedder.find_drawn(photo, max_faces=1))), 1
            height, width = photo.shape[:2]
        else:
            decoded = (
                photo
                if isinstance(photo, _Decoded)
                else _Decoded.of(load_photo(photo, max_pixels=self._limits.max_pixels))
            )
            found, factor = self._embedder.find(decoded.pixels_HWC, self._limits.max_faces), decoded.factor
            height, width = decoded.size
        faces = tuple(FoundFace(f.box * factor, f.kps * factor, f.det_score, f.vector) for f in found.faces)
        return FoundFaces(width, height, faces, found.doubt)


class Embedder:
    """FaceStage for single requests, batched. What may take long to decode is decoded apart, two at a time, until its deadline."""

    def __init__(self, config: ServeConfig) -> None:
        self._max_pixels = config.limits.max_pixels
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decoder")
        self._batcher: Batcher[Photo | _Decoded, FoundFaces] = Batcher(
            "embedder",
            FaceStage(config),
            max_batch_size=config.batch.embedder,
            max_waiting=config.batch.max_waiting,
        )

    async def detect(self, photo: Photo, deadline: float) -> tuple[FoundFaces, Timing]:
        """Raises PhotoError, ServingError."""
        if isinstance(photo, bytes) and not is_light(photo):
            decode = partial(self._decode, photo, deadline)
            return await self._batcher(
                await asyncio.get_running_loop().run_in_executor(self._decoders, decode), deadline
            )
        return await self._batcher(photo, deadline)

    def _decode(self, photo: bytes, deadline: float) -> _Decoded:
        left = deadline - time.monotonic()
        if left <= 0:
            raise deadline_exceeded("while it waited for a decoder")
        return _Decoded.of(load_photo_within(photo, min(SECONDS, left), max_pixels=self._max_pixels))

    async def similarity(self, pixels_HWC: Photo, reference_C: Floats, deadline: float) -> float:
        """Cosine of the largest face of a picture with `reference_C`; 0 where there is no face."""
        found, _ = await self._batcher(pixels_HWC, deadline)
        return float(found.faces[0].embedding_C @ reference_C) if found.faces else 0.0

    async def ready(self) -> bool:
        return True
