"""Photo and prompt in, LoRA and scored pictures out, in this process: what the endpoint does, without one.

With the same seeds the pictures are those of the endpoint, to float error: it draws many people in one batch, and a
picture does not depend on its batch.

Axes: B pictures, C embedding, N length of a LoRA vector, H/W pixels.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import Which
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.serving.config import SamplingConfig
from lora_diffusion.synthesis.synthesizer import Synthesizer


@dataclass(frozen=True, eq=False)
class Personalized:
    """vector_N: float32. images_BHWC: uint8 RGB; picture i was drawn with image_seed + i. seed: of the LoRA.

    similarity_B: cosine of each drawn face with the photos' embedding, 0 where no face was drawn.
    """

    vector_N: NDArray[np.float32]
    images_BHWC: NDArray[np.uint8]
    similarity_B: NDArray[np.float32]
    seed: int
    image_seed: int


class Personalizer:
    """A loaded synthesiser with the base model and the recogniser that it was trained with.

    Args:
        synthesizer: the shipped `tiny`, or a folder that `jobs/train.py` wrote.
        base: of another place than the synthesiser's folder names; it must be the same model.
        recogniser: likewise, as `EmbedderConfig.model`, or one that is loaded.
        defaults: settings that a call leaves out; those of the endpoint.

    Raises:
        ValueError: there is no such synthesiser, base model or recogniser, or they do not belong together.
    """

    def __init__(
        self,
        synthesizer: str | Path | Synthesizer = "tiny",
        base: str | BaseModel | None = None,
        *,
        recogniser: str | FaceEmbedder | None = None,
        device: str = "cpu",
        defaults: SamplingConfig | None = None,
    ) -> None:
        loaded = synthesizer if isinstance(synthesizer, Synthesizer) else Synthesizer.from_pretrained(synthesizer)
        self.synthesizer = loaded.to(device)
        if not isinstance(recogniser, FaceEmbedder):
            recogniser = FaceEmbedder(EmbedderConfig(model=recogniser or loaded.identity.recogniser_name))
        loaded.check_recogniser(recogniser)
        if not isinstance(base, BaseModel):
            base = BaseModel.from_pretrained(base or loaded.identity.base_name, device)
        loaded.check_base(base)
        self.base = base
        self.defaults = defaults or SamplingConfig()
        self.embedder = recogniser
        self._bank = LoRABank(base.unet, loaded.layout)

    def __call__(
        self,
        photos: Any,
        prompt: str,
        *,
        faces: Which = "one",
        seed: int | None = None,
        num_images: int = 1,
        image_seed: int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        negative_prompt: str | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Personalized:
        """`photos`: one of the person, or a list: paths, bytes, PIL images, uint8 RGB (H, W, 3). `num_images` 0 makes the LoRA only. Seeds that are left out are random, and told in the answer.

        `on_step`: called with the denoising steps of the pictures that are done, and their number."""
        defaults = self.defaults
        embedding_C = self.embedder.embed_person(photos, faces)
        seed = secrets.randbelow(2**31) if seed is None else seed
        image_seed = secrets.randbelow(2**31) if image_seed is None else image_seed
        vectors_1N = self.synthesizer.from_embedding(
            embedding_C,
            guidance_scale=defaults.latent_guidance_scale,
            num_inference_steps=defaults.latent_inference_steps,
            seed=seed,
            temperature=defaults.temperature,
            deviation_scale=defaults.deviation_scale,
        )
        height, width = self.base.image_size, self.base.image_size
        images_BHWC = np.zeros((0, height, width, 3), np.uint8)
        if num_images:
            images_BHWC = render(
                self.base,
                vectors_1N,
                [prompt] * num_images,
                range(image_seed, image_seed + num_images),
                bank=self._bank,
                num_inference_steps=num_inference_steps or defaults.num_inference_steps,
                guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
                negative_prompt=defaults.negative_prompt if negative_prompt is None else negative_prompt,
                on_step=on_step,
            )
        drawn = [self.embedder.find_drawn(image, max_faces=1) for image in images_BHWC]
        similarity_B = np.array([found[0].vector @ embedding_C if found else 0.0 for found in drawn], np.float32)
        return Personalized(vectors_1N[0], images_BHWC, similarity_B, seed, image_seed)
