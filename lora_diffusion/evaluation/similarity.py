"""How much of a person a LoRA carries over: similarity of its renders to the person's photos, beside its controls.

Similarity is the cosine of ArcFace embeddings between a render and the mean embedding of the person's photos. It is
always reported with: the base model without a LoRA, the LoRA of another person, and the photos among themselves (the
ceiling). Whether the scene still obeys the prompt is asked of a prompt scorer (`scoring.py`).

Axes: K people, P pictures of each, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.unit import unit
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import BaseModel

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

# Scenes that no photo of the corpus was told to show together; every person is drawn in the same ones.
PROMPTS = (
    "a photo of sks person, neutral, facing the camera, soft daylight, beach background, wearing a red v-neck top",
    "a photo of sks person, smiling, turned slightly left, studio light, grey studio background, wearing a navy shirt",
    "a photo of sks person, slight smile, turned slightly right, cool light, forest background, wearing a white crew neck top",
    "a photo of sks person, neutral, facing the camera, studio light, blue wall background, wearing a black high collar top",
)


@dataclass(frozen=True)
class RenderConfig:
    """How evaluation pictures are drawn: ``prompts`` x ``seeds_per_prompt`` for each person, seeds shared by all people."""

    prompts: tuple[str, ...] = PROMPTS  # scenes that no photo shows; everybody is drawn in the same ones
    seeds_per_prompt: int = 1  # pictures of each prompt
    first_seed: int = 1000  # of the pictures' noise
    num_inference_steps: int = 20  # of the base model's sampler
    guidance_scale: float = 1.25  # of the base model's sampler
    sampler: str = "ddim"  # ddim or dpm

    def pictures(self) -> tuple[list[str], list[int]]:
        """Prompts and seeds of one person's P pictures."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.seeds_per_prompt)]
        return prompts, [self.first_seed + i for i in range(len(prompts))]


def draw_people(base: BaseModel, bank: LoRABank, vectors_KN: Floats | None, config: RenderConfig) -> Pixels:
    """The evaluation pictures of K people, uint8 (K, P, H, W, 3); of the base model alone (1, P, ...) without vectors."""
    prompts, seeds = config.pictures()
    people = 1 if vectors_KN is None else len(vectors_KN)
    pictures = render(
        base,
        vectors_KN,
        prompts * people,
        seeds * people,
        bank=bank,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        sampler=config.sampler,
    )
    return pictures.reshape(people, len(prompts), *pictures.shape[1:])


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over people."""

    mean: float
    low: float
    high: float


def bootstrap(values_K: Floats, samples: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-person values and the interval that resampling people gives."""
    values = np.asarray(values_K, np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class SimilarityReport:
    """Cosines; ``photos`` is what a person's own photos have with each other, ``share_of_photos`` = own / photos."""

    people: int
    pictures: int
    own: Interval
    base: Interval
    other: Interval
    photos: Interval
    share_of_photos: float
    rank1: float
    faces_found: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def similarity_report(
    renders_KPE: Floats, found_KP: NDArray[np.bool_], base_PE: Floats, photos_KQE: Sequence[Floats]
) -> SimilarityReport:
    """Figures of K people from the embeddings of their renders, of the base model's, and of their photos.

    ``photos_KQE``: for each person the unit embeddings (Q, E) of their photos; the gallery is their mean. ``rank1``: how
    often the mean render of a person lies nearest to their own gallery among all K.
    """
    gallery_KE = unit(np.stack([unit(photos).mean(0) for photos in photos_KQE]))
    own = np.einsum("kpe,ke->kp", renders_KPE, gallery_KE).mean(1)
    cross_KK = np.einsum("kpe,je->kpj", renders_KPE, gallery_KE).mean(1)
    others = (cross_KK.sum(0) - np.diag(cross_KK)) / max(1, len(cross_KK) - 1)
    ceiling = np.array([_photos_among_themselves(unit(photos)) for photos in photos_KQE])
    mean_KE = unit(renders_KPE.mean(1))
    interval = bootstrap(own)
    return SimilarityReport(
        people=len(own),
        pictures=renders_KPE.shape[1],
        own=interval,
        base=bootstrap((base_PE @ gallery_KE.T).mean(0)),
        other=bootstrap(others),
        photos=bootstrap(ceiling),
        share_of_photos=interval.mean / float(ceiling.mean()),
        rank1=float(nearest_own(mean_KE @ gallery_KE.T, np.arange(len(own))).mean()),
        faces_found=float(found_KP.mean()),
    )


def nearest_own(cosines_KJ: Floats, people_K: NDArray[np.int64]) -> Floats:
    """(K,) 1 where the cosine with the person's own gallery, column `people_K`, is above all others; all are 0 without a face."""
    own_K = cosines_KJ[np.arange(len(people_K)), people_K]
    others_KJ = np.where(np.arange(cosines_KJ.shape[1]) == people_K[:, None], -np.inf, cosines_KJ)
    return np.asarray(own_K > others_KJ.max(1), np.float32)


def _photos_among_themselves(photos_QE: Floats) -> float:
    """Mean cosine of each photo with the mean of the person's other photos: what a perfect render could reach."""
    if len(photos_QE) < 2:
        return float("nan")
    rest = unit((photos_QE.sum(0, keepdims=True) - photos_QE) / (len(photos_QE) - 1))
    return float((photos_QE * rest).sum(1).mean())
