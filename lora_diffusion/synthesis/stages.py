"""What is trained: the LoRA VAE, then the denoiser in its code space. Each row's loss, with all chance given from outside.

Axes: B batch, N vector length, M varying parameters, Z code size, C condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.synthesis.dataset import CorpusRows
from lora_diffusion.synthesis.denoiser import Denoiser
from lora_diffusion.synthesis.diffusion import Diffusion, diffusion_loss
from lora_diffusion.synthesis.loop import Batch, Stage
from lora_diffusion.synthesis.vae import LoRAVAE, kl_nats

# Validation asks about each held-out person at so many noise levels, the same ones each time: few people, little chance.
VALIDATION_REPEATS = 8
Slots = NDArray[np.int64]
Condition = Literal["mean", "photo"]


class VAEStage(Stage):
    """The loss of `vae.py`, with the KL term rising over the first `kl_warmup` of the steps.

    `weights_M` (mean 1): what an error of each parameter costs, if not all the same.
    """

    def __init__(self, vae: LoRAVAE, rows: CorpusRows, steps: int, weights_M: Tensor | None = None) -> None:
        super().__init__()
        if weights_M is not None and (weights_M.shape != (vae.normaliser.size,) or not bool((weights_M >= 0).all())):
            raise ValueError(
                f"weights have shape {tuple(weights_M.shape)}; expected ({vae.normaliser.size},), none negative"
            )
        self.vae, self.rows, self.steps = vae, rows, steps
        self.register_buffer("weights_M", None if weights_M is None else weights_M / weights_M.mean())
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
        error_BM = (output_BM.float() - x_BM).square()
        error_B = (error_BM if self.weights_M is None else error_BM * self.weights_M).mean(1)
        kl_B = kl_nats(mean_BZ, logvar_BZ).sum(1)
        weight = self.kl_weight(step) if self.training else self.vae.config.kl_weight
        return error_B + weight / x_BM.shape[1] * kl_B, {"reconstruction": error_B, "kl": kl_B}

    def kl_weight(self, step: int) -> float:
        rise = self.vae.config.kl_warmup * self.steps
        return self.vae.config.kl_weight * (min(1.0, step / rise) if rise else 1.0)


class DenoiserStage(Stage):
    """The loss of `diffusion.py`; one timestep from each stratum, so that batches differ less.

    `condition`: the mean of the embeddings of a person's photos, or that of one photo, drawn anew in each step: what the
    synthesiser will be asked about.
    """

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

    def inputs(self, slots: Slots) -> Batch:
        if self.condition == "mean":
            return {"codes": self.codes(slots), "condition": self.rows.embeddings(slots)}
        photos_BFC, counts_B = self.rows.photo_embeddings(slots)
        return {"codes": self.codes(slots), "photos": photos_BFC, "photo_counts": counts_B}

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
        return loss_B, {}
