"""Denoiser, Decoder and Renderer for single requests: what Serve replicates, and what runs in one process without it.

torch is imported where a service is made: whoever only names the classes (the builder of the graph, the gateway) starts fast.

Axes: C embedding, Z code, N length of a LoRA vector.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_diffusion.serving.batcher import Batcher, Timing
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.library import content_id
from lora_diffusion.serving.messages import (
    Code,
    Decoded,
    DecodeTask,
    DrawnImage,
    DrawTask,
    Floats,
    LatentTask,
    LoRARecord,
    Owner,
    Pixels,
    Progress,
)
from lora_diffusion.serving.stages import DecoderStage, EmbedderStage, LibraryStage

if TYPE_CHECKING:
    from lora_diffusion.serving.renderer import Drawn

NOBODY = Owner()  # everybody's


class Denoiser:
    """Embedding -> code; edits and interpolations of codes."""

    def __init__(self, config: ServeConfig) -> None:
        from lora_diffusion.serving.latents import LatentStage

        set_threads(config)
        self._stage = LatentStage(config)
        self._batcher: Batcher[LatentTask, Code] = Batcher(
            "denoiser",
            self._stage,
            max_batch_size=config.batch.denoiser,
            max_waiting=config.batch.max_waiting,
        )

    async def sample(self, task: LatentTask, deadline: float) -> tuple[Code, Timing]:
        return await self._batcher(task, deadline)

    async def edit(self, code: Code, edits: Mapping[str, float]) -> Code:
        return await asyncio.to_thread(self._stage.edit, code, edits)

    async def interpolate(self, a: Code, b: Code, positions: Sequence[float]) -> list[Code]:
        return await asyncio.to_thread(self._stage.interpolate, a, b, positions)

    async def neighbour(self, embedding_C: Floats) -> Code | None:
        """Code of the nearest person that the synthesiser was trained on; None where it carries no table of them."""
        return await asyncio.to_thread(self._stage.neighbour, embedding_C)

    async def reconfigure(self, options: Mapping[str, Any]) -> None:
        """Serve calls this with `user_config`: `synthesizer` is served from now on, requests in hand keep theirs."""
        if "synthesizer" in options:
            await asyncio.to_thread(self._stage.models.load, options["synthesizer"])

    async def describe(self) -> dict[str, Any]:
        """For GET /v1/model: synthesiser, what it belongs to, and layout."""
        from lora_diffusion.serving.latents import attributes_of

        model = self._stage.models.current
        layout = model.layout
        return {
            "synthesizer": {
                "id": self._stage.models.current_id,
                "latent_size": model.code_size,
                "embedding_size": model.condition_size,
                "attributes": attributes_of(model),
                "latent_sampling": asdict(model.latent_sampling),
            },
            "identity": model.identity.to_dict(),
            "layout": {
                "layout_id": layout.layout_id,
                "rank": layout.rank,
                "alpha": layout.alpha,
                "size": layout.size,
                "target_modules": list(layout.target_modules),
            },
            "versions": {name: version(name) for name in ("lora-diffusion", "torch", "diffusers", "peft")},
        }

    async def ready(self) -> bool:
        return True


class Decoder:
    """Code -> LoRA in the library, vectors and files."""

    def __init__(self, config: ServeConfig, library: LibraryStage) -> None:
        from lora_diffusion.serving.latents import VectorStage

        set_threads(config)
        self._stage = VectorStage(config)
        self._library = library
        self._max_upload_bytes = config.library.max_upload_bytes
        self._licence = {"licence": config.licence} if config.licence else {}
        self._batcher: Batcher[DecodeTask, Floats] = Batcher(
            "decoder",
            self._stage,
            max_batch_size=config.batch.decoder,
            max_waiting=config.batch.max_waiting,
        )

    async def decode(self, task: DecodeTask, deadline: float) -> tuple[Decoded, Timing]:
        vector_N, timing = await self._batcher(task, deadline)
        record = LoRARecord(task.code, task.deviation_scale)
        lora_id = content_id(record, self._stage.layout.layout_id)
        putting = self._put(task.owner, lora_id, record)
        seconds, file = await asyncio.gather(putting, self._file(vector_N, record, task.format))
        return Decoded(lora_id, file, seconds), timing

    async def accept(self, data: bytes, format: str | None = None, owner: Owner = NOBODY) -> Decoded:
        """An uploaded LoRA file, checked against the layout. Raises ServingError "bad_lora"."""
        from lora_diffusion.serving.files import decode_file

        vector_N = await asyncio.to_thread(decode_file, data, self._stage.layout)
        if vector_N.nbytes > self._max_upload_bytes:
            raise ServingError(
                "bad_lora",
                f"The LoRA has {vector_N.nbytes / 1e6:,.1f} MB as float32; this server keeps at most "
                f"{self._max_upload_bytes / 1e6:,.1f} MB (library.max_upload_bytes).",
            )
        record = LoRARecord(vector_N=vector_N)
        file = await self._file(vector_N, record, format)
        lora_id = content_id(record, self._stage.layout.layout_id)
        await self._put(owner, lora_id, record)
        return Decoded(lora_id, file)

    async def _put(self, owner: Owner, lora_id: str, record: LoRARecord) -> float:
        """Seconds that it took."""
        started = time.perf_counter()
        await self._library.put(owner.place(lora_id), record, owner.token)
        return time.perf_counter() - started

    async def vector(self, lora_id: str, record: LoRARecord | None, deadline: float) -> Floats:
        """(N,) float32 of a LoRA of the library, or of `record`. Raises ServingError."""
        record = record or await self._library.get(lora_id)
        if record.vector_N is not None:
            return record.vector_N
        assert record.code is not None
        return (await self._batcher(DecodeTask(record.code, record.deviation_scale), deadline))[0]

    async def file(self, lora_id: str, format: str, deadline: float) -> bytes:
        """Raises ServingError "unknown_lora"; "stale_latent" where the synthesiser that made it is not loaded any more."""
        record = await self._library.get(lora_id)
        file = await self._file(await self.vector(lora_id, record, deadline), record, format)
        assert file is not None
        return file

    async def reconfigure(self, options: Mapping[str, Any]) -> None:
        """As the Denoiser's."""
        if "synthesizer" in options:
            await asyncio.to_thread(self._stage.models.load, options["synthesizer"])

    async def ready(self) -> bool:
        return True

    async def _file(self, vector_N: Floats, record: LoRARecord, format: str | None) -> bytes | None:
        from lora_diffusion.serving.files import encode_file, encode_latent

        if format is None:
            return None
        model_id = record.code.model_id if record.code else None
        metadata = self._stage.models.identity(model_id).metadata() | self._licence
        if format != "latent":
            return await asyncio.to_thread(encode_file, vector_N, self._stage.layout, format, metadata)
        if record.code is None:
            raise ServingError("stale_latent", "This LoRA was uploaded: it has no latent. Take another format.")
        return encode_latent(record.code, metadata)


class Renderer:
    """LoRAs + prompts -> encoded pictures, many people in one running batch. decoder: for tasks without a vector."""

    def __init__(self, config: ServeConfig, decoder: DecoderStage | None, embedder: EmbedderStage) -> None:
        import torch

        from lora_diffusion.models.stable_diffusion import BaseModel
        from lora_diffusion.serving.engine import RenderEngine
        from lora_diffusion.serving.latents import synthesizer_folder
        from lora_diffusion.serving.renderer import AsyncRenderer
        from lora_diffusion.synthesis.synthesizer import Synthesizer

        set_threads(config)
        self._decoder = decoder
        self._embedder = embedder
        synthesizer = Synthesizer.from_pretrained(synthesizer_folder(config.synthesizer))
        name = config.base or synthesizer.identity.base_name
        base = BaseModel.from_pretrained(name, config.device, getattr(torch, config.dtype))
        synthesizer.check_base(base)
        self._base = base
        self._drawing = AsyncRenderer(
            RenderEngine(base, synthesizer.layout), max_rows=config.batch.renderer, max_waiting=config.batch.max_waiting
        )

    async def draw(self, task: DrawTask, deadline: float) -> AsyncGenerator[Progress | DrawnImage | Timing, None]:
        """Pictures as they are ready, with progress between. Raises ServingError."""
        from lora_diffusion.serving.engine import Picture

        vector_N = None if task.record is None else task.record.vector_N
        if vector_N is None:
            assert self._decoder is not None, "no decoder: every task must bring its vector"
            vector_N = await self._decoder.vector(task.lora_id, task.record, deadline)
        pictures = [
            Picture(
                vector_N,
                task.prompt,
                task.negative_prompt,
                seed,
                task.guidance_scale,
                task.num_inference_steps,
                task.lora_scale,
            )
            for seed in task.seeds
        ]
        async with aclosing(self._drawing.draw(pictures, deadline)) as events:
            async for event in events:
                yield event if isinstance(event, Progress | Timing) else await self._encoded(event, task, deadline)

    async def _encoded(self, drawn: Drawn, task: DrawTask, deadline: float) -> DrawnImage:
        similarity = None
        if task.reference_C is not None:
            similarity = await self._embedder.similarity(drawn.pixels_HWC, task.reference_C, deadline)
        return DrawnImage(drawn.index, encode_image(drawn.pixels_HWC, task.image_format), similarity)

    async def describe(self) -> dict[str, Any]:
        fingerprint = await asyncio.to_thread(lambda: self._base.fingerprint)
        return {
            "name": self._base.name,
            "fingerprint": fingerprint,
            "image_size": self._base.image_size,
            "words": self._base.words,
        }

    async def ready(self) -> bool:
        return True


def set_threads(config: ServeConfig) -> None:
    import torch

    torch.set_num_threads(config.threads)


def encode_image(pixels_HWC: Pixels, format: str) -> bytes:
    """PNG, JPEG (quality 95) or WebP (lossless) of uint8 RGB (H, W, 3)."""
    options: dict[str, Any] = {"jpeg": {"quality": 95}, "webp": {"lossless": True}, "png": {}}
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format.upper(), **options[format])
    return buffer.getvalue()
