"""One embedding in, LoRA vectors out: the whole trained synthesiser.

    synthesizer = Synthesizer.from_pretrained("tiny")
    vectors_BN = synthesizer.from_photo("ada.jpg", num_samples=4)
    formats.save(vectors_BN[0], synthesizer.layout, "ada.safetensors")

Arrays go in, arrays come out (numpy, float32). Axes: B faces or samples, K people, N vector length, Z code size, C condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.artifacts.identity import SHIPPED_SYNTHESIZERS, Identity, provenance_identity
from lora_diffusion.config import from_dict
from lora_diffusion.faces.choice import Which
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.unit import unit
from lora_diffusion.lora.finetune import FinetuneResult
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.devices import resolve_device
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import CodeSpace
from lora_diffusion.synthesis.denoiser import Denoiser
from lora_diffusion.synthesis.diffusion import Diffusion, sample_codes, score_codes
from lora_diffusion.synthesis.edits import AttributeDirections, slerp
from lora_diffusion.synthesis.folder import LatentSampling, Neighbours, Parts, Provenance, read_folder, write_folder
from lora_diffusion.synthesis.inversion import InversionConfig, InversionResult, invert, refine

__all__ = ["EMBEDDED", "LatentSampling", "Neighbours", "Provenance", "Synthesizer"]

EMBEDDED = SHIPPED_SYNTHESIZERS

Floats = NDArray[np.float32]
Array = NDArray[Any] | Tensor


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
        latent_sampling: LatentSampling | None = None,
    ) -> None:
        if codes.normaliser.vector_size != layout.size or codes.size != denoiser.code_size:
            raise ValueError(
                f"the parts do not fit: layout of {layout.size} parameters, code space from {codes.normaliser.vector_size} "
                f"parameters to {codes.size} numbers, denoiser of {denoiser.code_size}"
            )
        self.layout, self.codes, self.denoiser, self.diffusion = layout, codes, denoiser, diffusion
        self.provenance = provenance or Provenance()
        self.directions, self.neighbours = directions, neighbours
        self.latent_sampling = latent_sampling or LatentSampling()
        for part in (codes, denoiser, diffusion):
            part.eval().requires_grad_(False)
        self._embedder: FaceEmbedder | None = None

    def __repr__(self) -> str:
        base, recogniser = self.provenance.base.get("name"), self.provenance.recogniser.get("name")
        attributes = self.directions.names if self.directions else ()
        return (
            f"Synthesizer(base={base!r}, recogniser={recogniser!r}, rank={self.layout.rank}, vector_size={self.layout.size}, "
            f"code_size={self.code_size}, attributes={list(attributes)}, device={str(self.device)!r})"
        )

    @property
    def identity(self) -> Identity:
        """What the LoRAs belong to."""
        return provenance_identity(vars(self.provenance), self.layout.layout_id)

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
        """Itself, there. Raises ValueError for a device that is not there."""
        device = resolve_device(device)
        for part in (self.codes, self.denoiser, self.diffusion):
            part.to(device)
        return self

    # -- a face -> LoRAs ----------------------------------------------------------------------------------------------

    def from_photo(
        self,
        photos: Any,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        deviation_scale: float | None = None,
        best_of: int = 1,
        *,
        faces: Which | None = None,
        embedder: FaceEmbedder | None = None,
    ) -> Floats:
        """LoRA vectors (num_samples, N) of the person in a photo, or in a list of photos, whose embeddings are averaged.

        Photos that show another person than most are left out, with a warning.

        A photo is a path, the bytes of a file, a PIL image or uint8 RGB (H, W, 3). The settings are those of `from_embedding`.
        `faces`: "largest" takes the largest face of a photo that shows several, "one" refuses it (default: as `embedder` says).
        `embedder` must be the recogniser that conditioned the training; without one, the one that `provenance` names is loaded.
        Raises FaceError (no face, several, different people) and PhotoError (not a photo), both ValueErrors, which name the photo.
        """
        if embedder is None:
            embedder = self._embedder = self._embedder or FaceEmbedder(
                EmbedderConfig(model=self.identity.recogniser_name)
            )
        self.check_recogniser(embedder)
        embedding_C = embedder.embed_person(photos, faces)
        return self.from_embedding(
            embedding_C, num_samples, guidance_scale, num_inference_steps, seed, temperature, deviation_scale, best_of
        )

    def from_embedding(
        self,
        embeddings: Array,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        deviation_scale: float | None = None,
        best_of: int = 1,
    ) -> Floats:
        """LoRA vectors (B * num_samples, N) of embeddings (B, C) or (C,); a face's samples stand together.

        Sample i of every face starts from the noise of seed + i, so what comes out for a face does not depend on the others.
        What is left out of `LatentSampling`'s settings is as the synthesiser's folder recommends.
        `best_of`: draw so many times num_samples and keep those that agree best with the face, best first (`score`).
        """
        conditions_BC = self.check_embeddings(embeddings)
        if num_samples < 1 or best_of < 1:
            raise ValueError(f"num_samples is {num_samples} and best_of {best_of}; both must be at least 1")
        draws = num_samples * best_of
        seeds = [seed + i for _ in range(len(conditions_BC)) for i in range(draws)]
        drawn_BC = np.repeat(conditions_BC, draws, axis=0)
        codes_BZ = self.denoise(drawn_BC, seeds, guidance_scale, num_inference_steps, temperature)
        if best_of > 1:
            scores = self.score(codes_BZ, drawn_BC).reshape(-1, draws)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :num_samples]
            codes_BZ = codes_BZ[(best + draws * np.arange(len(scores))[:, None]).ravel()]
        return self.decode(codes_BZ, deviation_scale)

    def denoise(
        self,
        embeddings_BC: Array,
        seeds_B: Sequence[int],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
    ) -> Floats:
        """Codes (B, Z), one for each embedding and seed."""
        condition = torch.from_numpy(self.check_embeddings(embeddings_BC)).to(self.device)
        how = self._how(guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, temperature=temperature)
        settings = how.guidance_scale, how.num_inference_steps, how.temperature
        codes = sample_codes(self.denoiser, condition, seeds_B, *settings, diffusion=self.diffusion)
        return _numpy(codes)

    def _how(self, **given: Any) -> LatentSampling:
        """What the folder recommends, but for what is given."""
        return replace(self.latent_sampling, **{name: value for name, value in given.items() if value is not None})

    def score(self, codes_BZ: Array, embeddings_BC: Array) -> Floats:
        """(B,) how well codes agree with faces, without a render: see `diffusion.score_codes`. Higher is better."""
        condition_BC = torch.from_numpy(self.check_embeddings(embeddings_BC)).to(self.device)
        return _numpy(score_codes(self.denoiser, self._tensor(codes_BZ), condition_BC, diffusion=self.diffusion))

    def decode(self, codes_BZ: Array, deviation_scale: float | None = 1.0) -> Floats:
        """LoRA vectors (B, N) of codes; their deviation from the corpus' mean is multiplied by `deviation_scale`.

        1 is the inverse of `encode`; None is what the synthesiser's folder recommends to draw with.
        """
        deviation_scale = self.latent_sampling.deviation_scale if deviation_scale is None else deviation_scale
        return self.codes.decode_array(self._tensor(codes_BZ), deviation_scale)

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
        return unit(values)

    # -- the space ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, vectors_BN: Array) -> Floats:
        """Codes (B, Z) of LoRA vectors."""
        vectors = self._tensor(vectors_BN)
        self.layout.check(vectors)
        return _numpy(self.codes.encode(vectors))

    def sample(
        self,
        count: int,
        seed: int = 0,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        deviation_scale: float | None = None,
    ) -> Floats:
        """LoRA vectors (count, N) of nobody in particular: no face, seeds seed, seed + 1, ...; see `from_embedding`.

        `temperature` is 1 whatever the folder recommends for faces: without one, people differ by their noise alone.
        """
        seeds = range(seed, seed + count)
        how = self._how(num_inference_steps=num_inference_steps)
        codes = sample_codes(
            self.denoiser, None, seeds, 1.0, how.num_inference_steps, temperature, diffusion=self.diffusion
        )
        return self.decode(_numpy(codes), deviation_scale)

    def interpolate(self, a: Array, b: Array, t: float) -> Floats:
        """Codes between `a` (t = 0) and `b` (t = 1), (B, Z) or (Z,), along the great circle, lengths along the straight line.

        A straight line between two codes would pass near the mean, where nobody in particular is. Raises ValueError for vectors.
        """
        return slerp(_numpy(self._codes(a)), _numpy(self._codes(b)), t)

    def edit(self, codes_BZ: Array, attribute: str, strength: float) -> Floats:
        """Codes with more (or, negative, less) of an attribute; strength in standard deviations of the corpus.

        Raises ValueError for an attribute without a direction, and for vectors.
        """
        if self.directions is None:
            raise ValueError(
                "this synthesiser has no attribute directions: fit some with AttributeDirections.fit(codes, labels)"
            )
        return _numpy(self.directions.edit(self._codes(codes_BZ), attribute, strength))

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

    def nearest(self, embeddings: Array, embedder: FaceEmbedder | None = None) -> tuple[NDArray[np.int64], Floats]:
        """The nearest corpus person of each embedding (B,), as a row of `neighbours`, and the cosine (B,).

        `embedder`: what made the embeddings, to be compared with the recogniser of the corpus. Raises ValueError.
        """
        if embedder is not None:
            self.check_recogniser(embedder)
        if self.neighbours is None:
            raise ValueError("this synthesiser carries no corpus people: save it with neighbours for this control")
        cosines_BP = self.check_embeddings(embeddings) @ _numpy(self.neighbours.embeddings_PC).T
        rows = cosines_BP.argmax(1)
        return rows, cosines_BP[np.arange(len(rows)), rows]

    def check_base(self, base: BaseModel) -> None:
        """Raises ValueError unless the LoRAs were made for this base model."""
        self.identity.check_base(base, "the synthesiser")

    def check_recogniser(self, embedder: FaceEmbedder) -> None:
        """Raises ValueError unless the synthesiser was trained with this recogniser."""
        self.identity.check_recogniser(embedder, "the synthesiser")

    # -- the folder ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder (local or s3://; see `folder.py`). `dtype` float16 halves it."""
        trained = self.layout, self.codes, self.denoiser, self.diffusion
        write_folder(
            path, Parts(*trained, self.provenance, self.directions, self.neighbours, self.latent_sampling), dtype
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Synthesizer:
        """Load a folder, `s3://...`, or the shipped `tiny`. Raises ValueError if it is none, cut, or of another version."""
        return cls(*read_folder(EMBEDDED.get(str(path), path))).to(device)

    def _codes(self, values: Array) -> Tensor:
        codes = self._tensor(values)
        if codes.ndim not in (1, 2) or codes.shape[-1] != self.code_size:
            hint = ": these are LoRA vectors; encode(vectors) gives their codes" * (
                codes.shape[-1:] == (self.layout.size,)
            )
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; expected ({self.code_size},) or (B, {self.code_size}){hint}"
            )
        return codes

    def _tensor(self, values: Array) -> Tensor:
        return torch.as_tensor(values).to(self.device, torch.float32)


def _numpy(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)
