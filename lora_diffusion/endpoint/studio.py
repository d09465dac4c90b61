"""What the routes do, in terms of the stages: which stage gets what, and what it costs in hops.

Embeddings and codes (2 KB each) pass through here; vectors go from the Decoder to the Renderer, and drawn faces from the
Renderer to the Embedder for their scores, without touching the gateway.

Axes: C embedding (512).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.remote import ATTEMPTS, PAUSE_SECONDS, ReplicaLost
from lora_diffusion.endpoint.schemas import Upload
from lora_diffusion.faces.choice import LeftOut, Which, choose_face
from lora_diffusion.faces.photos import PhotoError
from lora_diffusion.faces.same_person import mean_of, one_person
from lora_diffusion.serving.batcher import Timing
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
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
    Progress,
)
from lora_diffusion.serving.stages import DecoderStage, DenoiserStage, EmbedderStage, LibraryStage, RendererStage, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Sampled:
    """A code, the seed that it was drawn with, the embedding that it was drawn for."""

    code: Code
    seed: int | None = None
    embedding_C: Floats | None = None
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Person:
    """Who is in the photos: the mean embedding of those that show one person, theirs, and the photos of others."""

    embedding_C: Floats
    embeddings: tuple[Floats, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Made:
    """A LoRA that lies in the library. token: deletes it, of one that was made now."""

    decoded: Decoded
    sampled: Sampled | None = None
    record: LoRARecord | None = None
    token: str = ""


class Studio:
    """The stages: deployments (`Remote`), or the services themselves in one process."""

    def __init__(
        self,
        config: ServeConfig,
        metrics: Metrics,
        *,
        embedder: EmbedderStage,
        denoiser: DenoiserStage,
        decoder: DecoderStage,
        renderer: RendererStage,
        library: LibraryStage,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.embedder = embedder
        self.denoiser = denoiser
        self.decoder = decoder
        self.renderer = renderer
        self.library = library

    async def ready(self) -> None:
        """Returns when all stages have answered; raises what keeps one from it."""
        stages: list[Stage] = [self.embedder, self.denoiser, self.decoder, self.renderer, self.library]
        await together(stage.ready() for stage in stages)

    async def faces(self, photos: Sequence[Upload], deadline: float) -> list[FoundFaces]:
        """Raises PhotoError, which names the photo."""
        return await together(self._faces(photo, _name(photo, i, photos), deadline) for i, photo in enumerate(photos))

    async def _faces(self, photo: Upload, name: str, deadline: float) -> FoundFaces:
        try:
            found, timing = await self.embedder.detect(photo.data, deadline)
        except PhotoError as error:
            raise PhotoError(error.reason, f"{name}: {error}" if name else str(error)) from None
        self.metrics.stage(timing)
        return found

    async def person(self, photos: Sequence[Upload], which: Which, deadline: float) -> Person:
        """Raises FaceError for a photo of nobody or of several, and for photos of different people."""
        names = [_name(photo, i, photos) or "The photo" for i, photo in enumerate(photos)]
        vectors_PC = np.stack(
            [
                choose_face(found.faces, found.doubt, which, name).embedding_C
                for name, found in zip(names, await self.faces(photos, deadline), strict=True)
            ]
        )
        same_P, left_out = one_person(vectors_PC, names)
        return Person(mean_of(vectors_PC[same_P]), tuple(vectors_PC[same_P]), left_out)

    async def sample(self, tasks: Sequence[LatentTask], deadline: float) -> list[Sampled]:
        answers = await together(self.denoiser.sample(task, deadline) for task in tasks)
        for _, timing in answers:
            self.metrics.stage(timing)
        return [Sampled(code, task.seed, task.embedding_C) for (code, _), task in zip(answers, tasks, strict=True)]

    async def decode(
        self,
        samples: Sequence[Sampled],
        deviation_scale: float | None,
        deadline: float,
        owner: Owner,
        format: str | None = None,
    ) -> list[Made]:
        """Codes -> LoRAs in the library. Waits a moment for a decoder that is still loading the code's synthesiser."""
        tasks = [DecodeTask(sampled.code, deviation_scale, format, owner) for sampled in samples]
        answers = await together(self._decode(task, deadline) for task in tasks)
        for decoded, timing in answers:
            self.metrics.stage(timing)
            self.metrics.kept.observe(decoded.put_seconds)
        return [
            Made(decoded, sampled, LoRARecord(sampled.code, deviation_scale), owner.token)
            for (decoded, _), sampled in zip(answers, samples, strict=True)
        ]

    async def _decode(self, task: DecodeTask, deadline: float) -> tuple[Decoded, Timing]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self.decoder.decode(task, deadline)
            except ServingError as error:
                if error.reason != "stale_latent" or attempt == ATTEMPTS:
                    raise
                # After a reload the denoiser may be ahead of the decoder by a moment.
                ours = (await self.denoiser.describe())["synthesizer"]
                if (task.code.model_id, len(task.code.values_Z)) != (ours["id"], ours["latent_size"]):
                    raise
                await asyncio.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError("unreachable")

    async def draw(self, task: DrawTask, deadline: float) -> AsyncGenerator[Progress | DrawnImage, None]:
        """Progress, and each picture as it is ready. If the renderer dies, another draws what is left."""
        left = dict(enumerate(task.seeds))
        for attempt in range(1, ATTEMPTS + 1):
            order = list(left)
            stream = self.renderer.draw(replace(task, seeds=tuple(left.values())), deadline)
            try:
                async for event in stream:
                    if isinstance(event, Timing):
                        self.metrics.stage(event)
                    elif isinstance(event, DrawnImage):
                        index = order[event.index]
                        del left[index]
                        yield replace(event, index=index)
                    else:
                        yield event
                return
            except ReplicaLost:
                if not left:
                    return
                if attempt == ATTEMPTS:
                    raise ServingError(
                        "overloaded", "The renderer is being restarted. Try again a little later."
                    ) from None
                await asyncio.sleep(PAUSE_SECONDS * attempt)
            finally:
                await stream.aclose()

    async def likeness(self, task: DrawTask, deadline: float) -> float:
        """Mean similarity of the task's pictures with its reference; one without a face counts 0."""
        drawn = [event async for event in self.draw(task, deadline) if isinstance(event, DrawnImage)]
        return float(np.mean([image.similarity or 0.0 for image in drawn]))

    async def landmarks(
        self, task: DrawTask, person: Sampled, deviation_scale: float | None, deadline: float
    ) -> dict[str, Any]:
        """What the person's likeness is to be read against, by the same prompt and seeds: base, nearest and lora."""
        assert task.reference_C is not None
        near = await self.denoiser.neighbour(task.reference_C)
        own = replace(task, record=LoRARecord(person.code, deviation_scale))
        tasks = [replace(own, lora_scale=0.0), own]
        if near is not None:
            tasks.append(replace(task, record=LoRARecord(near, deviation_scale)))
        base, lora, *nearest = await together(self.likeness(task, deadline) for task in tasks)
        return {"base": base, "nearest": nearest[0] if nearest else None, "lora": lora}


def mean_cosine(vectors: Sequence[Floats]) -> float | None:
    """Of unit vectors, over all pairs; None for fewer than two."""
    cosines = [float(a @ b) for i, a in enumerate(vectors) for b in vectors[:i]]
    return float(np.mean(cosines)) if cosines else None


def _name(photo: Upload, index: int, photos: Sequence[Upload]) -> str:
    """As the sender named it, else its number among several, else nothing."""
    return photo.shown or (f"Photo {index + 1}" if len(photos) > 1 else "")


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All answers, or the first error, with the rest cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def new_seed() -> int:
    return secrets.randbelow(2**31)
