"""What is trained of ``tiny-sd``, the embedded Stable Diffusion: the autoencoder, then UNet and text encoder together.

Axes: M pictures, B batch, C latent channels, V captions of a picture, S token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.training.loop import Batch, Slots, Stage

NOBODY = np.empty(0, np.int64)  # validation rows: there are none


class AutoencoderStage(Stage):
    """VAE: L1 + perceptual distance (features of a recogniser, so that the person survives) + a light KL term.

    images_MHWC: uint8.
    """

    def __init__(
        self,
        vae: Any,
        images_MHWC: np.ndarray,
        features: Callable[[Tensor], list[Tensor]] | None = None,
        perceptual_weight: float = 0.2,
        kl_weight: float = 1e-4,
    ) -> None:
        super().__init__()
        self.vae, self.images_MHWC, self.features = vae, images_MHWC, features
        self.perceptual_weight, self.kl_weight = perceptual_weight, kl_weight
        self.train_slots, self.validation_slots = np.arange(len(images_MHWC)), NOBODY
        halvings = len(vae.config.block_out_channels) - 1
        self.latent_shape = (vae.config.latent_channels, *(side >> halvings for side in images_MHWC.shape[1:3]))

    def inputs(self, slots: Slots) -> Batch:
        return {"images": torch.from_numpy(self.images_MHWC[slots])}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        return {"noise": torch.randn(count, *self.latent_shape, generator=generator, device=generator.device)}

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = inputs["images"].permute(0, 3, 1, 2) / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        output = self.vae.decode(posterior.mean + posterior.std * draws["noise"]).sample
        difference = (output - images).float()
        l1_B = difference.abs().mean((1, 2, 3))
        kl_B = posterior.kl() / posterior.mean[0].numel()
        loss_B = l1_B + 0.5 * difference.square().mean((1, 2, 3)) + self.kl_weight * kl_B
        parts = {"l1": l1_B, "kl": kl_B}
        if self.features is not None:
            parts["perceptual"] = feature_distance(self.features, output, images)
            loss_B = loss_B + self.perceptual_weight * parts["perceptual"]
        return loss_B, parts


def feature_distance(features: Callable[[Tensor], list[Tensor]], output: Tensor, images: Tensor) -> Tensor:
    """(B,) sum over the feature maps of the mean squared difference at unit length, as in LPIPS."""
    pairs = zip(features(output), features(images), strict=True)
    return torch.stack([(_unit(a) - _unit(b.detach())).square().flatten(1).mean(1) for a, b in pairs]).sum(0)


def _unit(features: Tensor) -> Tensor:
    """Every position's feature vector at length sqrt(channels), as in LPIPS."""
    return F.normalize(features.float(), dim=1) * math.sqrt(features.shape[1])


class DenoiserStage(Stage):
    """UNet and text encoder: MSE of the prediction, weighted by ``loss_weights``; one of the captions of each picture.

    means_MCHW, stds_MCHW: of the pictures' latents. tokens_MVS: of their captions.
    """

    def __init__(
        self, unet: Any, text_encoder: Any, scheduler: Any, means_MCHW: Tensor, stds_MCHW: Tensor, tokens_MVS: Tensor
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.rows = {"means": means_MCHW, "stds": stds_MCHW, "tokens": tokens_MVS}
        self.train_slots, self.validation_slots = np.arange(len(means_MCHW)), NOBODY

    def inputs(self, slots: Slots) -> Batch:
        return {name: rows[torch.from_numpy(slots)] for name, rows in self.rows.items()}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        shape, total = self.rows["means"].shape[1:], self.scheduler.config.num_train_timesteps
        # one timestep from each stratum: less variance between batches than independent draws
        place = (torch.randperm(count, **where) + torch.rand(count, **where)) / count
        return {
            "latent": torch.randn(count, *shape, **where),
            "noise": torch.randn(count, *shape, **where),
            "timesteps": (place * total).long().clamp(max=total - 1),
            "caption": torch.randint(self.rows["tokens"].shape[1], (count,), **where),
        }

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        latents, noise, timesteps = (
            inputs["means"] + inputs["stds"] * draws["latent"],
            draws["noise"],
            draws["timesteps"],
        )
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        tokens_BS = inputs["tokens"][torch.arange(len(latents)), draws["caption"]]
        text = self.text_encoder(tokens_BS)[0]
        prediction = self.unet(noisy, timesteps, encoder_hidden_states=text).sample.float()
        error_B = (prediction - target).square().mean((1, 2, 3))
        weights_B = loss_weights(self.scheduler, timesteps.cpu()).to(error_B.device)
        return weights_B * error_B, {"mse": error_B}


def loss_weights(scheduler: Any, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of each timestep's loss: min(SNR, gamma) + 1 on the error of x0, expressed for the scheduler's prediction type.

    Below gamma that is a plain v-prediction loss; above, min-SNR (Hang et al. 2023, arXiv:2303.09556) holds it down. Not
    min(SNR, gamma) itself: with zero terminal SNR its weight vanishes where sampling starts, at the noise levels at
    which only the words decide, and the model hardly learns to listen to them.
    """
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas).clamp(min=1e-8)
    kind = scheduler.config.prediction_type
    error_of_x0 = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[kind]
    return (snr.clamp(max=gamma) + 1) / error_of_x0.clamp(min=1e-8)
