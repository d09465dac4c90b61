"""What is trained: the LoRA VAE, then the denoiser in its code space. Each row's loss, with all randomness passed in.

Axes: B batch, N vector length, M varying parameters, Z code size, C condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.synthesis.denoiser import Denoiser
from lora_diffusion.synthesis.diffusion import Diffusion, denoise, diffusion_loss
from lora_diffusion.synthesis.training.dataset import CorpusRows
from lora_diffusion.synthesis.vae import LoRAVAE, vae_loss
from lora_diffusion.training.loop import Batch, Stage

# Validation asks about each held-out person at so many noise levels, the same each time: its loss varies less.
VALIDATION_REPEATS = 8
# From no noise and without guidance, few steps tell weights apart as well as the settings that are drawn with.
RANK_STEPS = 4
Slots = NDArray[np.int64]
Condition = Literal["mean", "photo"]


class VAEStage(Stage):
    """The loss of `vae.py`, with the KL term rising over the first `kl_warmup` of the steps."""

    def __init__(self, vae: LoRAVAE, rows: CorpusRows, steps: int) -> None:
        super().__init__()
        self.vae, self.rows, self.steps = vae, rows, steps
        self.train_slots, self.validation_slots = rows.train, rows.validation

    def inputs(self, slots: Slots) -> Batch:
        return {"vectors": self.rows.vectors(slots)}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        draws = {"latent": torch.randn(count, self.vae.config.latent_size, **where)}
        if self.vae.config.input_noise:
            draws["input"] = torch.randn(count, self.vae.normaliser.size, **where)
        return draws

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """In eval mode at the posterior's mean, so that validation holds no chance, with the full KL weight."""
        x_BM = self.vae.normaliser.normalise(inputs["vectors"])
        latent_BZ = draws["latent"] if self.training else torch.zeros_like(draws["latent"])
        output_BM, mean_BZ, logvar_BZ = self.vae(x_BM, latent_BZ, draws.get("input") if self.training else None)
        weight = self.kl_weight(step) if self.training else self.vae.config.kl_weight
        return vae_loss(x_BM, output_BM, mean_BZ, logvar_BZ, weight)

    def kl_weight(self, step: int) -> float:
        rise = self.vae.config.kl_warmup * self.steps
        return self.vae.config.kl_weight * (min(1.0, step / rise) if rise else 1.0)


class DenoiserStage(Stage):
    """The loss of `diffusion.py`; one timestep from each stratum, so that batches differ less.

    `condition`: the mean of the embeddings of a person's photos, or that of one photo, drawn anew in each step: what the
    synthesiser will be asked about.

    Validation also draws a code for each face, and looks which people's own codes are nearest to it (`percentile_rank`). That
    decides, not the loss: of a LoRA, most is the optimiser's noise, so the loss is lowest where next to nothing is said about
    anybody (LOG.md, 2026-11-26).
    """

    selection_metrics: ClassVar[tuple[str, ...]] = ("rank", "loss")

    def __init__(
        self,
        denoiser: Denoiser,
        diffusion: Diffusion,
        rows: CorpusRows,
        codes: Callable[[Slots], Tensor],
        condition: Condition = "mean",
    ) -> None:
        """`codes(slots)`: (B, Z) float32 on the CPU."""
        super().__init__()
        self.denoiser, self.diffusion, self.rows, self.codes = denoiser, diffusion, rows, codes
        self.condition = condition
        self.train_slots = rows.train
        self.validation_slots = np.tile(rows.validation, VALIDATION_REPEATS)
        self._validation_VZ: Tensor | None = None

    def inputs(self, slots: Slots) -> Batch:
        what = {"slots": torch.from_numpy(slots), "codes": self.codes(slots)}
        if self.condition == "mean":
            return {**what, "condition": self.rows.embeddings(slots)}
        photos_BFC, counts_B = self.rows.photo_embeddings(slots)
        return {**what, "photos": photos_BFC, "photo_counts": counts_B}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        config = self.diffusion.config
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        place = torch.randperm(count, **where) + torch.rand(count, **where)
        draws = {
            "noise": torch.randn(count, self.denoiser.code_size, **where),
            "timesteps": (place / count * config.num_train_timesteps).long().clamp(max=config.num_train_timesteps - 1),
            "drop": torch.rand(count, **where) < config.condition_dropout,
        }
        if self.condition == "photo":
            draws["photo"] = torch.rand(count, **where)
        return draws

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.condition == "mean":
            condition_BC = inputs["condition"]
        else:
            place_B = (draws["photo"] * inputs["photo_counts"]).long()
            condition_BC = inputs["photos"][torch.arange(len(place_B)), place_B]
        drop_B = draws["drop"] if self.training else torch.zeros_like(draws["drop"])
        noise_BZ = self.diffusion.noise(draws["noise"])
        loss_B = diffusion_loss(
            self.denoiser, inputs["codes"], condition_BC, noise_BZ, draws["timesteps"], drop_B, self.diffusion
        )
        return loss_B, {} if self.training else {"rank": self.rank(inputs["slots"], condition_BC)}

    @torch.no_grad()
    def rank(self, slots_B: Tensor, condition_BC: Tensor) -> Tensor:
        """(B,) percentile rank of people of the validation rows by the codes drawn for their faces."""
        if self._validation_VZ is None:
            self._validation_VZ = self.codes(self.rows.validation).to(condition_BC.device)
        start_BZ = condition_BC.new_zeros(len(condition_BC), self.denoiser.code_size)
        drawn_BZ = denoise(self.denoiser, start_BZ, condition_BC, 1.0, RANK_STEPS, diffusion=self.diffusion)
        people_V = torch.as_tensor(self.rows.validation, device=slots_B.device)
        with torch.autocast(drawn_BZ.device.type, enabled=False):
            return percentile_rank(drawn_BZ.float(), self._validation_VZ, slots_B[:, None] == people_V)


def percentile_rank(drawn_BZ: Tensor, codes_VZ: Tensor, own_BV: Tensor) -> Tensor:
    """(B,) share of the others whose codes are nearer, by cosine, to the drawn one than the person's own; 0 is best.

    Equally near ones count half, so codes that say nothing, or only one person, give the 0.5 of chance.
    Its mean is the mean percentile rank of Hu et al. 2008 (Collaborative filtering for implicit feedback datasets).
    """
    cosine_BV = F.normalize(drawn_BZ, dim=1) @ F.normalize(codes_VZ, dim=1).T
    mine_B1 = cosine_BV[own_BV][:, None]
    nearer_BV = (cosine_BV > mine_B1).float() + 0.5 * (cosine_BV == mine_B1).float()
    others = codes_VZ.shape[0] - 1
    if not others:
        return torch.full_like(mine_B1[:, 0], 0.5)
    return nearer_BV.masked_fill(own_BV, 0.0).sum(1) / others
