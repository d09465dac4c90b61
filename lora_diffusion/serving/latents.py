"""The two halves of the synthesiser as stages: embedding -> code (Denoiser), code -> LoRA (Decoder).

Codes carry the id of the synthesiser that they belong to. After a reload both stages keep the model before the last, so
that a code on its way, or one that a client kept, still finds its decoder.

Axes: B batch, C embedding, Z code, N length of a LoRA vector.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lora_diffusion.artifacts.identity import Identity, no_synthesizer
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.files import fetch_folder
from lora_diffusion.places import place_or_name
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Code, DecodeTask, LatentTask
from lora_diffusion.synthesis.synthesizer import EMBEDDED, Synthesizer

Floats = NDArray[np.float32]
KEPT_MODELS = 2


def synthesizer_folder(name_or_path: str) -> Path:
    """The folder of a shipped synthesiser, a local one, or a copy of one in a bucket. Raises ValueError."""
    name = place_or_name(name_or_path)
    if name.startswith("s3://"):
        return fetch_folder(name)
    folder = Path(EMBEDDED.get(name, name))
    if not (folder / "config.json").is_file():
        raise no_synthesizer(folder)
    return folder


def model_id_of(folder: Path) -> str:
    """16 hex digits over the content of the folder's config and weights."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Models:
    """The loaded synthesisers, newest last."""

    def __init__(self, name_or_path: str, device: str) -> None:
        self._device = device
        self._loaded: dict[str, Synthesizer] = {}
        self.load(name_or_path)

    def load(self, name_or_path: str) -> str:
        """Make this one current; returns its id. Raises ValueError, and then nothing has changed."""
        folder = synthesizer_folder(name_or_path)
        model_id = model_id_of(folder)
        model = self._loaded.pop(model_id, None) or Synthesizer.from_pretrained(folder, self._device)
        if self._loaded:  # the other stages keep the base model and the recogniser that they have
            way_out = "Start another endpoint for it"
            ours, theirs = f"what this endpoint serves ({self.current_id})", f"the synthesiser at {name_or_path}"
            parts = ("base", "recogniser", "layout_id")
            self.current.identity.check(model.identity, ours, theirs, way_out, parts)
        self._loaded[model_id] = model
        for old in list(self._loaded)[:-KEPT_MODELS]:
            del self._loaded[old]
        return model_id

    @property
    def current_id(self) -> str:
        return next(reversed(self._loaded))

    @property
    def current(self) -> Synthesizer:
        return self._loaded[self.current_id]

    def identity(self, model_id: str | None) -> Identity:
        """What a LoRA of that synthesiser belongs to; of an upload, or one that is no longer loaded, only the base model."""
        model = self._loaded.get(model_id or "")
        return Identity(self.current.identity.base) if model is None else model.identity

    def __getitem__(self, model_id: str) -> Synthesizer:
        if model_id not in self._loaded:
            raise ServingError(
                "stale_latent",
                f"The latent belongs to synthesiser {model_id}; {', '.join(reversed(self._loaded))} "
                "can be used here. Make it again from the photo.",
            )
        return self._loaded[model_id]


class LatentStage:
    """Embeddings -> codes, each with its own seed; those with the same settings run together."""

    def __init__(self, config: ServeConfig) -> None:
        self.models = Models(config.synthesizer, config.device)

    @torch.no_grad()
    def __call__(self, tasks: Sequence[LatentTask]) -> list[Code | Exception]:
        model_id, model = self.models.current_id, self.models.current
        groups: dict[tuple[float | None, int | None, float | None], list[int]] = defaultdict(list)
        for i, task in enumerate(tasks):
            groups[task.guidance_scale, task.num_inference_steps, task.temperature].append(i)
        embeddings_BC = np.stack([task.embedding_C for task in tasks])
        nearest_B = nearest_similarity(model, embeddings_BC)
        answers: list[Code | Exception] = [ServingError("diverged", "")] * len(tasks)
        for (guidance_scale, steps, temperature), members in groups.items():
            seeds = [tasks[i].seed for i in members]
            codes_BZ = model.denoise(embeddings_BC[members], seeds, guidance_scale, steps, temperature)
            for i, code_Z in zip(members, codes_BZ, strict=True):
                answers[i] = _finite(Code(code_Z, model_id, None if nearest_B is None else float(nearest_B[i])))
        return answers

    def edit(self, code: Code, edits: Mapping[str, float]) -> Code:
        """The code moved along named attributes. Raises ServingError for one that the synthesiser does not know."""
        model = self.models[code.model_id]
        known = attributes_of(model)
        if unknown := sorted(set(edits) - set(known)):
            raise ServingError(
                "unknown_attribute", f"No attribute {unknown[0][:40]!r}; there are: {', '.join(known) or 'none'}."
            )
        values_BZ = _of_size(code, model.code_size)[None]
        for attribute, strength in edits.items():
            values_BZ = model.edit(values_BZ, attribute, strength)
        return Code(values_BZ[0], code.model_id)

    def interpolate(self, a: Code, b: Code, positions: Sequence[float]) -> list[Code]:
        """Codes between a (0) and b (1)."""
        if a.model_id != b.model_id:
            raise ServingError("stale_latent", "The two latents belong to different synthesisers: make them again.")
        model = self.models[a.model_id]
        a_Z, b_Z = (_of_size(code, model.code_size) for code in (a, b))
        return [Code(model.interpolate(a_Z, b_Z, t), a.model_id) for t in positions]

    def neighbour(self, embedding_C: Floats) -> Code | None:
        """The code of the nearest person of the corpus, or None if the synthesiser carries no table of them."""
        model_id, model = self.models.current_id, self.models.current
        if model.neighbours is None:
            return None
        (row,), _ = model.nearest(embedding_C)
        return Code(model.neighbours.codes_PZ[row].float().cpu().numpy(), model_id)


class VectorStage:
    """Codes -> LoRA vectors (N,), float32."""

    def __init__(self, config: ServeConfig) -> None:
        self.models = Models(config.synthesizer, config.device)

    @property
    def layout(self) -> LoRALayout:
        return self.models.current.layout

    @torch.no_grad()
    def __call__(self, tasks: Sequence[DecodeTask]) -> list[Floats | Exception]:
        groups: dict[tuple[str, float | None], list[int]] = defaultdict(list)
        for i, task in enumerate(tasks):
            groups[task.code.model_id, task.deviation_scale].append(i)
        answers: list[Floats | Exception] = [ServingError("diverged", "")] * len(tasks)
        for (model_id, deviation_scale), members in groups.items():
            fitting: dict[int, Floats] = {}
            for i in members:
                try:
                    fitting[i] = _of_size(tasks[i].code, self.models[model_id].code_size)
                except ServingError as error:
                    answers[i] = error
            if fitting:
                vectors_BN = self.models[model_id].decode(np.stack(list(fitting.values())), deviation_scale)
                for i, vector_N in zip(fitting, vectors_BN, strict=True):
                    answers[i] = vector_N if np.isfinite(vector_N).all() else _diverged()
        return answers


def nearest_similarity(model: Synthesizer, embeddings_BC: Floats) -> Floats | None:
    """(B,) cosine with the nearest person of the corpus, or None if the synthesiser carries no table of them."""
    return None if model.neighbours is None else model.nearest(embeddings_BC)[1]


def attributes_of(model: Synthesizer) -> list[str]:
    """What `edit` knows."""
    return [] if model.directions is None else list(model.directions.names)


def _of_size(code: Code, size: int) -> Floats:
    if len(code.values_Z) != size:
        raise ServingError(
            "stale_latent", f"The latent has {len(code.values_Z)} numbers; this synthesiser's have {size}."
        )
    return code.values_Z


def _finite(code: Code) -> Code | Exception:
    return code if np.isfinite(code.values_Z).all() else _diverged()


def _diverged() -> ServingError:
    return ServingError("diverged", "The synthesiser gave no finite LoRA. Try another seed, or less guidance.")
