"""Photos of people as fine-tuning sees them: latents, prompt embeddings, and where in a picture the loss counts.

Axes: K identities together, P photos of one person, n samples of one identity in one step (its photos, then class
images), C / H / W latents, S / D prompt embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel

# The face counts up to so far from its centre, in half sides of its box: hair, ears and chin lie outside of the box.
_REACH, _SOFTNESS = 1.3, 1 / 6


@dataclass(frozen=True, eq=False)
class PersonPhotos:
    """Photos of one person, uint8 RGB (P, H, W, 3) in the size of the base model; captions, one for each, if any.

    `face_boxes` (P, 4), x1 y1 x2 y2 in px of the photos, say where the face is, as a detector finds it; NaN: nowhere.
    """

    identity: str
    pixels: NDArray[np.uint8]
    captions: tuple[str, ...] | None = None
    face_boxes: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        shape, dtype = np.shape(self.pixels), getattr(self.pixels, "dtype", None)
        if len(shape) != 4 or shape[0] == 0 or shape[-1] != 3 or dtype != np.uint8:
            raise ValueError(
                f"{self.identity}: photos are {dtype} {shape}; expected uint8 RGB (P, H, W, 3) with at least one photo"
            )
        if self.captions is not None and len(self.captions) != shape[0]:
            raise ValueError(f"{self.identity}: {len(self.captions)} captions for {shape[0]} photos")
        if self.face_boxes is not None and np.shape(self.face_boxes) != (shape[0], 4):
            raise ValueError(f"{self.identity}: face_boxes are {np.shape(self.face_boxes)}; expected {(shape[0], 4)}")


def face_weights(
    boxes_P4: NDArray[np.float32], picture: tuple[int, int], cells: tuple[int, int], weight: float
) -> Tensor:
    """Weights of the loss (P, H, W) over `cells` (H, W) of latents, mean 1 in each photo of `picture` (height, width) px.

    `weight` in an ellipse around the face, 1 outside, with a soft edge; 1 everywhere where there is no box (NaN).
    """
    boxes_P411 = torch.as_tensor(boxes_P4, dtype=torch.float32)[:, :, None, None]
    x1, y1, x2, y2 = boxes_P411.unbind(1)
    (height, width), (H, W) = picture, cells
    y_H1 = ((torch.arange(H) + 0.5) * height / H)[:, None]
    x_W = (torch.arange(W) + 0.5) * width / W
    radius_PHW = torch.hypot((2 * x_W - x1 - x2) / (x2 - x1), (2 * y_H1 - y1 - y2) / (y2 - y1))
    weights_PHW = 1 + (weight - 1) * torch.sigmoid((_REACH - radius_PHW) / _SOFTNESS)
    weights_PHW = torch.where(boxes_P411.isnan().any(1), 1.0, weights_PHW)
    return weights_PHW / weights_PHW.mean((1, 2), keepdim=True)


class PhotoData:
    """What does not change between the steps of a batch of people, on the device: latents and prompt embeddings."""

    def __init__(
        self, base: BaseModel, people: Sequence[PersonPhotos], config: FinetuneConfig, class_latents: Tensor | None
    ) -> None:
        sizes = {person.pixels.shape[1:3] for person in people}
        if len(sizes) > 1:
            raise ValueError(f"photos have the sizes {sorted(sizes)}; all people of a batch need the same")
        # Each person's photos are encoded by themselves, so that their bits do not depend on the company.
        latents = [base.encode_images(person.pixels) for person in people]
        captions = [
            caption
            for person in people
            for caption in (person.captions or [config.instance_prompt] * len(person.pixels))
        ]
        self.photo_counts_K = torch.tensor([len(part) for part in latents])
        self.photo_starts_K = self.photo_counts_K.cumsum(0) - self.photo_counts_K
        self.has_prior = class_latents is not None and config.prior_weight > 0
        self.sizes = [config.batch_size]
        if self.has_prior:
            assert class_latents is not None
            self.sizes.append(config.prior_batch_size)
            self.class_start, self.class_count = len(captions), len(class_latents)
            latents.append(class_latents)
            captions += [config.class_prompt] * len(class_latents)
        self.latents = torch.cat(latents)
        self.shape: tuple[int, int, int] = tuple(self.latents.shape[1:])  # type: ignore[assignment]
        distinct = sorted(set(captions))
        self.prompts = base.encode_prompts(distinct).to(base.dtype)
        places = {caption: place for place, caption in enumerate(distinct)}
        self.prompt_of_photo = torch.tensor([places[caption] for caption in captions])
        self.weights = torch.ones(len(captions), 1, *self.shape[1:])
        if config.face_weight != 1:
            for person, first in zip(people, self.photo_starts_K, strict=True):
                if person.face_boxes is None:
                    raise ValueError(
                        f"{person.identity}: face_weight is {config.face_weight}, but no face_boxes tell where the faces "
                        "are: take them from a FaceEmbedder, or set face_weight=1"
                    )
                size: tuple[int, int] = person.pixels.shape[1:3]
                weights_PHW = face_weights(person.face_boxes, size, self.shape[1:], config.face_weight)
                self.weights[first : first + len(weights_PHW), 0] = weights_PHW
        self.weights = self.weights.to(self.latents.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents (K, n, C, H, W), prompt embeddings (K, n, S, D) and weights of the loss (K, n, 1, H, W) of a step.

        Everyone's photos come round in their own order: photo number `step * batch_size + i`, modulo their count.
        """
        place_n = step * self.sizes[0] + torch.arange(self.sizes[0])
        index_Kn = self.photo_starts_K[:, None] + place_n % self.photo_counts_K[:, None]
        if self.has_prior:
            class_n = self.class_start + (step * self.sizes[1] + torch.arange(self.sizes[1])) % self.class_count
            index_Kn = torch.cat([index_Kn, class_n.expand(len(index_Kn), -1)], dim=1)
        return self._at(index_Kn)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Like `batch`, but each person's photos are drawn at random, none twice; without class images."""
        places_K = [torch.randperm(int(P), generator=generator)[: self.sizes[0]] for P in self.photo_counts_K]
        return self._at(self.photo_starts_K[:, None] + torch.stack(places_K))

    def _at(self, index_Kn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prompt_Kn, index_Kn = self.prompt_of_photo[index_Kn], index_Kn.to(self.latents.device)
        return self.latents[index_Kn], self.prompts[prompt_Kn.to(self.latents.device)], self.weights[index_Kn]
