"""How like the person a LoRA draws: renders of fixed prompts and seeds, compared with the photos by the recogniser.

Axes: K people, N length of a LoRA vector, S scoring renders of one person, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lora_diffusion.faces.embedder import FaceEmbedder, embed_pictures
from lora_diffusion.factory.config import ScoreConfig
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import BaseModel

_SEED = 1_000  # far from what a user would type


class Scorer:
    """The same prompts and seeds for everybody. Without prompts all similarities are NaN."""

    def __init__(self, base: BaseModel, embedder: FaceEmbedder, config: ScoreConfig) -> None:
        self.base, self.embedder, self.config = base, embedder, config
        self.prompts = [prompt for prompt in config.prompts for _ in range(config.seeds_per_prompt)]
        self.seeds = list(range(_SEED, _SEED + len(self.prompts)))

    def __call__(self, photos_KE: np.ndarray, vectors_KN: np.ndarray, bank: LoRABank) -> tuple[np.ndarray, np.ndarray]:
        """(K,) mean cosine of each person's renders with its photos, and of the base model's renders with them.

        A render without exactly one face counts as 0.
        """
        people, each = len(photos_KE), len(self.prompts)
        if not each:
            return np.full(people, np.nan), np.full(people, np.nan)
        pictures = self.draw(vectors_KN, self.prompts * people, self.seeds * people, bank)
        renders_KSE = embed_pictures(self.embedder, pictures)[0].reshape(people, each, -1)
        return np.einsum("kse,ke->k", renders_KSE, photos_KE) / each, (photos_KE @ self._base_renders_SE.T).mean(1)

    @cached_property
    def _base_renders_SE(self) -> np.ndarray:
        return embed_pictures(self.embedder, self.draw(None, self.prompts, self.seeds))[0]

    def draw(
        self, vectors_KN: np.ndarray | None, prompts: Sequence[str], seeds: Sequence[int], bank: LoRABank | None = None
    ) -> np.ndarray:
        """Pictures as `render` draws them, with the sampler settings of scoring."""
        return render(
            self.base,
            vectors_KN,
            prompts,
            seeds,
            bank=bank,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            max_batch=self.config.max_batch,
        )
