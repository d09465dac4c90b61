"""What the stage `pictures` is judged by: pictures of held-out people, drawn as users draw, by likeness, prompts and fine detail.

Axes: B people, N vector length, R recognisers, E embedding, C/H/W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, embed_pictures
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.rendering import PROMPT_PARTS, load_prompt_scorer, render
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.training.pictures_config import PicturesConfig

FIRST_SEED, BASE_SEEDS = 700, 8  # of the pictures; the base model's figures come from so many of each prompt


class Judge:
    """`embedder` is that of the recogniser that teaches; the second one of `config` teaches nothing."""

    def __init__(self, config: PicturesConfig, base: BaseModel, bank: LoRABank, embedder: FaceEmbedder) -> None:
        self.config, self.base, self.bank = config, base, bank
        self.embedders = {"likeness": embedder}
        if config.second_recogniser:
            self.embedders["second"] = FaceEmbedder(EmbedderConfig(config.second_recogniser, several_faces="largest"))
        self.scorer = load_prompt_scorer(config.prompt_scorer)
        self._base_figures: dict[str, float] = {}

    def draw(self, vectors_BN: Tensor) -> NDArray[np.uint8]:
        """(B, pictures of each, H, W, C) of all prompts."""
        people = len(vectors_BN)
        pictures = self._draw(vectors_BN, people, self.config.score.seeds_per_prompt)
        return pictures.reshape(people, -1, *pictures.shape[1:])

    def figures(self, pictures: NDArray[np.uint8], targets_BRE: Tensor) -> dict[str, Tensor]:
        """(B,) each: similarity to the targets by each recogniser (a missing face counts 0), faces, fine detail, prompts obeyed."""
        people, flat = len(pictures), pictures.reshape(-1, *pictures.shape[2:])
        parts = {}
        for number, (name, embedder) in enumerate(self.embedders.items()):
            vectors, seen = embed_pictures(embedder, flat)
            by_person = torch.from_numpy(vectors).view(people, -1, vectors.shape[-1])
            parts[name] = (by_person * targets_BRE[:, number, None].cpu()).sum(2).mean(1)
            parts.setdefault("faces", torch.from_numpy(seen).float().view(people, -1).mean(1))
        scenes = self._scenes(people, self.config.score.seeds_per_prompt)[0]
        return parts | {name: value.view(people, -1).mean(1) for name, value in self._obeyed(flat, scenes).items()}

    def score(self, values: dict[str, Any], photo_detail: float) -> dict[str, Any]:
        """`validation_score`, lower is better, and what parts of prompts and fine detail lack against the base model."""
        base = self._of_base()
        lack = [value - values[f"validation_{name}"] for name, value in base.items() if name != "detail"]
        short = sum(max(0.0, value) for value in lack) / max(1, len(lack))
        coarse = max(0.0, 1 - values["validation_detail"] / base.get("detail", photo_detail))
        score = values["validation_loss"] + self.config.prompt_price * short + self.config.detail_price * coarse
        return {"validation_score": score, "validation_prompts_short": short, "validation_coarse": coarse}

    def _of_base(self) -> dict[str, float]:
        if not self._base_figures:
            figures = self._obeyed(self._draw(None, 1, BASE_SEEDS), self._scenes(1, BASE_SEEDS)[0])
            self._base_figures = {name: float(value.float().mean()) for name, value in figures.items()}
        return self._base_figures

    def _scenes(self, people: int, each: int) -> tuple[list[str], list[int]]:
        prompts = [prompt for prompt in self.config.score.prompts for _ in range(each)] * people
        return prompts, list(range(FIRST_SEED, FIRST_SEED + len(prompts) // people)) * people

    def _draw(self, vectors_BN: Tensor | None, people: int, each: int) -> NDArray[np.uint8]:
        c = self.config.score
        prompts, seeds = self._scenes(people, each)
        with torch.autocast(self.base.device.type, enabled=False):
            return render(
                self.base, vectors_BN, prompts, seeds, bank=self.bank, num_inference_steps=c.num_inference_steps,
                guidance_scale=c.guidance_scale, max_batch=c.max_batch,
            )  # fmt: skip

    def _obeyed(self, pictures: NDArray[np.uint8], prompts: list[str]) -> dict[str, Tensor]:
        """Of each picture: fine detail; for each part of the prompts that is asked for, 1 where it is shown, 0 where not."""
        figures = {"detail": fine_detail(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)}
        if self.scorer is not None:
            hits = torch.from_numpy(self.scorer.hits(pictures, prompts))
            asked = (hits >= 0).all(0)
            figures |= {f"prompt_{part}": hits[:, h].float() for h, part in enumerate(PROMPT_PARTS) if asked[h]}
        return figures


def fine_detail(pictures_BCHW: Tensor) -> Tensor:
    """(B,) mean difference of a picture in -1 .. 1 to its blurred copy (3 × 3), in levels of 256."""
    blurred = F.avg_pool2d(F.pad(pictures_BCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return 127.5 * (pictures_BCHW - blurred).abs().mean((1, 2, 3))
