"""One embedding in, LoRA vectors out: the whole trained synthesiser in one folder.

    config.json            format version, layout, code space, denoiser, diffusion, provenance
    codes.safetensors      normaliser and PCA or VAE
    denoiser.safetensors   denoiser, and the prior's factor if it has one
    edits.safetensors      attribute directions, if any
    neighbours.safetensors embeddings and codes of corpus people, if any: the nearest-neighbour control

Arrays go in, arrays come out (numpy, float32). Axes: B faces or samples, N vector length, Z code size, C condition, P people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.base import ASSETS, BaseModel
from lora_diffusion.checkpoint import strip_prefix, with_prefix
from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.lora.finetune import FinetuneConfig, FinetuneResult, PersonPhotos
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.codes import CodeSpace, build_codes
from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig, sample_codes
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.synthesis.inversion import InversionConfig, InversionResult, invert, refine

FORMAT = "lora-diffusion-synthesizer"
FORMAT_VERSION = 1
EMBEDDED = {"tiny": ASSETS / "synthesizer"}

Floats = NDArray[np.float32]
Array = NDArray[Any] | Tensor


@dataclass(frozen=True)
class Provenance:
    """What a synthesiser was made from. `base` and `recogniser`: name and fingerprint; `figures`: as measured."""

    base: dict[str, str] = field(default_factory=dict)
    recogniser: dict[str, str] = field(default_factory=lambda: {"name": "tiny"})
    corpus: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)  # the corpus' recipe, for `refine`
    figures: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Corpus people: unit embeddings (P, C) and codes (P, Z)."""

    embeddings_PC: Tensor
    codes_PZ: Tensor


class Synthesizer:
    """Make one from its parts after training, or with `from_pretrained`. All parts in eval mode, on one device."""

    def __init__(
        self,
        layout: LoRALayout,
        codes: CodeSpace,
        denoiser: Denoiser,
        diffusion: Diffusion,
        provenance: Provenance | None = None,
        directions: AttributeDirections | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        if codes.normaliser.vector_size != layout.size or codes.size != denoiser.code_size:
            raise ValueError(
                f"the parts do not fit: layout of {layout.size} parameters, code space from {codes.normaliser.vector_size} "
                f"parameters to {codes.size} numbers, denoiser of {denoiser.code_size}"
            )
        self.layout, self.codes, self.denoiser, self.diffusion = layout, codes, denoiser, diffusion
        self.provenance = provenance or Provenance()
        self.directions, self.neighbours = directions, neighbours
        for part in (codes, denoiser, diffusion):
            part.eval().requires_grad_(False)
        self._embedder: FaceEmbedder | None = None

    @property
    def condition_size(self) -> int:
        """C, the length of an identity embedding."""
        return self.denoiser.condition_size

    @property
    def code_size(self) -> int:
        """Z."""
        return self.codes.size

    @property
    def device(self) -> torch.device:
        return self.denoiser.no_face_W.device

    def to(self, device: str | torch.device) -> Synthesizer:
        for part in (self.codes, self.denoiser, self.diffusion):
            part.to(device)
        return self

    # -- a face -> LoRAs ----------------------------------------------------------------------------------------------

    def from_photo(self, image: Any, *, embedder: FaceEmbedder | None = None, **settings: Any) -> Floats:
        """LoRA vectors of the one face in a photo: path, bytes, PIL image or uint8 RGB (H, W, 3). See `from_embedding`.

        `embedder` must be the recogniser that conditioned the training; without one, the one that `provenance` names is loaded.
        Raises FaceError (no face, several) and PhotoError (not a photo), both ValueErrors.
        """
        if embedder is None:
            if self._embedder is None:
                self._embedder = FaceEmbedder(EmbedderConfig(model=self.provenance.recogniser["name"]))
            embedder = self._embedder
        pixels = load_photo(image) if isinstance(image, str | Path | bytes) else np.asarray(image)
        return self.from_embedding(embedder.embed(pixels).vector, **settings)

    def from_embedding(
        self,
        embeddings: Array,
        num_samples: int = 1,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 25,
        seed: int = 0,
        deviation_scale: float = 1.0,
    ) -> Floats:
        """LoRA vectors (B * num_samples, N) of embeddings (B, C) or (C,); a face's samples stand together.

        Sample i of every face starts from the noise of seed + i, so what comes out for a face does not depend on the others.
        """
        conditions_BC = self.check_embeddings(embeddings)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        seeds = [seed + i for _ in range(len(conditions_BC)) for i in range(num_samples)]
        codes_BZ = self.denoise(
            np.repeat(conditions_BC, num_samples, axis=0), seeds, guidance_scale, num_inference_steps
        )
        return self.decode(codes_BZ, deviation_scale)

    def denoise(
        self, embeddings_BC: Array, seeds_B: Sequence[int], guidance_scale: float = 1.0, num_inference_steps: int = 25
    ) -> Floats:
        """Codes (B, Z), one for each embedding and seed."""
        condition = torch.from_numpy(self.check_embeddings(embeddings_BC)).to(self.device)
        codes = sample_codes(
            self.denoiser, condition, seeds_B, guidance_scale, num_inference_steps, diffusion=self.diffusion
        )
        return _numpy(codes)

    @torch.no_grad()
    def decode(self, codes_BZ: Array, deviation_scale: float = 1.0) -> Floats:
        """LoRA vectors (B, N) of codes; their deviation from the corpus' mean is multiplied by `deviation_scale`."""
        vectors_BN = self.codes.decode(self._tensor(codes_BZ))
        if deviation_scale != 1:
            mean_N = self.codes.normaliser.mean_N
            vectors_BN = mean_N + deviation_scale * (vectors_BN - mean_N)
        return _numpy(vectors_BN)

    def check_embeddings(self, embeddings: Array) -> Floats:
        """(B, C) float32 unit vectors. Raises ValueError for another length, zeros, NaN or infinity."""
        values = np.asarray(embeddings.detach().cpu() if isinstance(embeddings, Tensor) else embeddings)
        if values.ndim == 1:
            values = values[None]
        if values.ndim != 2 or values.shape[1] != self.condition_size or values.dtype.kind not in "fiu":
            raise ValueError(
                f"embeddings are {values.dtype} {values.shape}; expected ({self.condition_size},) or (B, {self.condition_size}), "
                f"from the recogniser {self.provenance.recogniser.get('name')!r}"
            )
        norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms < 1e-6).any():
            raise ValueError(
                "an embedding is zero or holds NaN or infinity: no face was found there, or it was not filled in"
            )
        return np.asarray(values / norms, np.float32)

    # -- the space ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, vectors_BN: Array) -> Floats:
        """Codes (B, Z) of LoRA vectors."""
        vectors = self._tensor(vectors_BN)
        self.layout.check(vectors)
        return _numpy(self.codes.encode(vectors))

    def sample(self, count: int, seed: int = 0, num_inference_steps: int = 25, deviation_scale: float = 1.0) -> Floats:
        """LoRA vectors (count, N) of nobody in particular: no face, seeds seed, seed + 1, ..."""
        seeds = range(seed, seed + count)
        codes = sample_codes(self.denoiser, None, seeds, 1.0, num_inference_steps, diffusion=self.diffusion)
        return self.decode(_numpy(codes), deviation_scale)

    def interpolate(self, a: Array, b: Array, t: float) -> Floats:
        """Codes between `a` (t = 0) and `b` (t = 1), (B, Z) or (Z,), along the great circle, lengths along the straight line.

        A straight line between two codes would pass near the mean, where nobody in particular is.
        """
        a_BZ, b_BZ = (np.asarray(x.cpu() if isinstance(x, Tensor) else x, np.float64) for x in (a, b))
        length_a, length_b = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a_BZ, b_BZ))
        unit_a, unit_b = a_BZ / np.maximum(length_a, 1e-12), b_BZ / np.maximum(length_b, 1e-12)
        angle = np.arccos(np.clip((unit_a * unit_b).sum(-1, keepdims=True), -1, 1))
        sine = np.sin(angle)
        close = sine < 1e-6  # parallel (or opposite, where no circle is shorter): the straight line
        safe = np.where(close, 1, sine)
        weight_a = np.where(close, 1 - t, np.sin((1 - t) * angle) / safe)
        weight_b = np.where(close, t, np.sin(t * angle) / safe)
        length = (1 - t) * length_a + t * length_b
        return np.asarray((weight_a * unit_a + weight_b * unit_b) * length, np.float32)

    def edit(self, codes_BZ: Array, attribute: str, strength: float) -> Floats:
        """Codes with more (or, negative, less) of an attribute; strength in standard deviations of the corpus."""
        if self.directions is None:
            raise ValueError(
                "this synthesiser has no attribute directions: fit some with AttributeDirections.fit(codes, labels)"
            )
        return _numpy(self.directions.edit(self._tensor(codes_BZ), attribute, strength))

    def invert(
        self,
        base: BaseModel,
        people: Sequence[PersonPhotos],
        config: InversionConfig | None = None,
        start_KZ: Array | None = None,
    ) -> InversionResult:
        """Codes of photos by gradient through `base`, from `start_KZ` (such as `denoise` gives) or the corpus' mean."""
        self.check_base(base)
        start = None if start_KZ is None else self._tensor(start_KZ)
        return invert(base, self.layout, self.codes, people, config, start)

    def refine(
        self,
        base: BaseModel,
        people: Sequence[PersonPhotos],
        start_KN: Array,
        steps: int,
        config: FinetuneConfig | None = None,
    ) -> FinetuneResult:
        """Fine-tune synthesised LoRAs (K, N) for some steps, by the recipe of the corpus unless `config` says another."""
        self.check_base(base)
        if config is None and self.provenance.finetune:
            config = from_dict(FinetuneConfig, self.provenance.finetune)
        return refine(base, self.layout, people, self._tensor(start_KN), steps, config)

    def nearest(self, embeddings: Array) -> tuple[NDArray[np.int64], Floats]:
        """The nearest corpus person of each embedding (B,), as a row of `neighbours`, and the cosine (B,)."""
        if self.neighbours is None:
            raise ValueError("this synthesiser carries no corpus people: save it with neighbours for this control")
        cosines_BP = self.check_embeddings(embeddings) @ _numpy(self.neighbours.embeddings_PC).T
        rows = cosines_BP.argmax(1)
        return rows, cosines_BP[np.arange(len(rows)), rows]

    def check_base(self, base: BaseModel) -> None:
        """Raises ValueError unless the LoRAs were made for this base model."""
        wanted = self.provenance.base.get("fingerprint")
        if wanted and wanted != base.fingerprint:
            raise ValueError(
                f"the synthesiser makes LoRAs for {self.provenance.base.get('name')} ({wanted}), "
                f"the base model is {base.name or 'another one'} ({base.fingerprint}): load that one"
            )

    # -- the folder ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder (local or s3://). `dtype` float16 halves it; normaliser and small tensors stay in float32."""
        parts = {
            "codes": dict(self.codes.state_dict()),
            "denoiser": with_prefix("denoiser", dict(self.denoiser.state_dict())),
        }
        parts["denoiser"] |= with_prefix("diffusion", dict(self.diffusion.state_dict()))
        config: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout_id": self.layout.layout_id,
            "layout": self.layout.to_dict(),
            "code_size": self.code_size,
            "condition_size": self.condition_size,
            "codes": self.codes.describe(),
            "denoiser": to_dict(self.denoiser.config),
            "diffusion": to_dict(self.diffusion.config),
            "provenance": to_dict(self.provenance),
        }
        if self.directions is not None:
            config["attributes"] = list(self.directions.names)
            parts["edits"] = self.directions.tensors()
        if self.neighbours is not None:
            parts["neighbours"] = {
                "embeddings_PC": self.neighbours.embeddings_PC,
                "codes_PZ": self.neighbours.codes_PZ,
            }
        config["files"] = sorted(parts)
        store = open_store(path)
        for name, tensors in parts.items():
            small = {key: _compact(tensor, dtype) for key, tensor in tensors.items()}
            store.write(f"{name}.safetensors", safetensors.torch.save(small))
        store.write_json("config.json", config)  # last: a folder without it is no synthesiser

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Synthesizer:
        """Load a folder, `s3://...`, or the shipped `tiny`.

        Raises:
            ValueError: nothing there, another format or version, missing or cut files, tensors that do not fit.
        """
        path = EMBEDDED.get(str(path), path)
        store = open_store(path)
        try:
            config = store.read_json("config.json")
        except FileNotFoundError as error:
            raise ValueError(
                f"no synthesiser at {path}: it has no config.json. Train one with jobs/train.py, or use {', '.join(EMBEDDED)}"
            ) from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError(f"{path}/config.json is none of a synthesiser: expected format {FORMAT!r}")
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"the synthesiser at {path} has format version {config.get('format_version')}, this release reads "
                f"{FORMAT_VERSION}: install the release of lora_diffusion that wrote it"
            )
        try:
            parts = {
                name: _float32(safetensors.torch.load(store.read(f"{name}.safetensors"))) for name in config["files"]
            }
            codes = build_codes(config["codes"], parts["codes"])
            denoiser = Denoiser(
                config["code_size"], config["condition_size"], from_dict(DenoiserConfig, config["denoiser"])
            )
            denoiser.load_state_dict(strip_prefix("denoiser", parts["denoiser"]))
            prior = strip_prefix("diffusion", parts["denoiser"])
            diffusion = Diffusion(from_dict(DiffusionConfig, config["diffusion"]), prior.get("factor_ZZ"))
            directions = None
            if "edits" in parts:
                directions = AttributeDirections(tuple(config["attributes"]), **parts["edits"])
            neighbours = Neighbours(**parts["neighbours"]) if "neighbours" in parts else None
            layout = LoRALayout.from_dict(config["layout"])
            provenance = from_dict(Provenance, config["provenance"])
        except FileNotFoundError as error:
            raise ValueError(f"the synthesiser at {path} is not whole: {error}. Download it again") from error
        except (KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"the synthesiser at {path} cannot be read: {error}. Download it again") from error
        return cls(layout, codes, denoiser, diffusion, provenance, directions, neighbours).to(device)

    def _tensor(self, values: Array) -> Tensor:
        return torch.as_tensor(values).to(self.device, torch.float32)


def _numpy(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)


def _compact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices in `dtype`; vectors (biases, the normaliser) as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.ndim >= 2 and tensor.is_floating_point() else tensor.clone()


def _float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
