"""Training ``tiny-sd``, the embedded Stable Diffusion: the autoencoder, then UNet and text encoder together.

Axes: B batch, C latent channels, S token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.artifacts.checkpoint import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
    strip_prefix,
    with_prefix,
)


@dataclass(frozen=True)
class TrainingConfig:
    """One stage of training. ``compute_dtype``: float32, or bfloat16 through autocast (fp32 weights and optimiser)."""

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    compute_dtype: str = "float32"
    checkpoint_every: int = 200
    seed: int = 0


def epoch_batches(count: int, batch_size: int, seed: int, step: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of indices, each epoch in its own order; starts as if ``step`` batches had been drawn before."""
    per_epoch = count // batch_size
    while True:
        epoch, within = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield order[within * batch_size : (within + 1) * batch_size]
        step += 1


class Stage(nn.Module):
    """What is trained in one stage: ``forward(indices, generator) -> (loss, parts to report)``."""

    def forward(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError


class AutoencoderStage(Stage):
    """VAE: L1 + perceptual distance (features of a recogniser, so that the person survives) + a light KL term."""

    def __init__(
        self,
        vae: Any,
        images: np.ndarray,
        features: Callable[[Tensor], list[Tensor]] | None = None,
        perceptual_weight: float = 0.2,
        kl_weight: float = 1e-4,
    ) -> None:
        super().__init__()
        self.vae, self.images, self.features = vae, images, features
        self.perceptual_weight, self.kl_weight = perceptual_weight, kl_weight

    def forward(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        device = next(self.vae.parameters()).device
        images = torch.from_numpy(self.images[indices]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        difference = (output - images).float()
        l1 = difference.abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + 0.5 * difference.square().mean() + self.kl_weight * kl
        parts = {"l1": l1.item(), "kl": kl.item()}
        if self.features is not None:
            pairs = zip(self.features(output), self.features(images), strict=True)
            perceptual = torch.stack([F.mse_loss(_unit(a), _unit(b.detach())) for a, b in pairs]).sum()
            loss = loss + self.perceptual_weight * perceptual
            parts["perceptual"] = perceptual.item()
        return loss, parts


def _unit(features: Tensor) -> Tensor:
    """Every position's feature vector at length sqrt(channels), as in LPIPS."""
    return F.normalize(features.float(), dim=1) * math.sqrt(features.shape[1])


class DenoiserStage(Stage):
    """UNet and text encoder: MSE of the prediction, weighted by ``loss_weights``."""

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        scheduler: Any,
        means: Tensor,
        stds: Tensor,
        tokens: Callable[[np.ndarray], Tensor],
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.scheduler, self.means, self.stds, self.tokens = scheduler, means, stds, tokens

    def forward(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        device = next(self.unet.parameters()).device
        rows = torch.from_numpy(indices)
        latents = self.means[rows] + self.stds[rows] * torch.randn(self.means[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        # one timestep from each stratum: less variance between batches than independent draws
        count = len(rows)
        total = self.scheduler.config.num_train_timesteps
        u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        timesteps = (u * total).long().clamp(max=total - 1)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        text = self.text_encoder(self.tokens(indices).to(device))[0]
        output = self.unet(noisy.to(device), timesteps.to(device), encoder_hidden_states=text).sample.float()
        error = (output - target.to(device)).square().mean((1, 2, 3))
        weights = loss_weights(self.scheduler, timesteps).to(device)
        return (weights * error).mean(), {"mse": error.mean().item()}


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


class Trainer:
    """Runs a stage: AdamW, warm-up and cosine decay, clipping, EMA, checkpoints. Resumes from ``folder`` by itself."""

    def __init__(
        self, stage: Stage, count: int, config: TrainingConfig, folder: Path, rank: int = 0, world: int = 1
    ) -> None:
        self.stage, self.count, self.config, self.folder = stage, count, config, folder
        self.rank, self.world = rank, world
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if (saved := load_checkpoint(folder)) is not None:
            self._restore(*saved)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        wanted = {**asdict(self.config), "steps": None, "checkpoint_every": None}
        found = {**meta["config"], "steps": None, "checkpoint_every": None}
        if wanted != found:
            raise ValueError(
                f"the checkpoint in {self.folder} was made with {found}, asked for now: {wanted}. "
                "Use the same settings to resume, or another folder to start anew."
            )
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"model.{i}"])
                self.ema[i].copy_(tensors[f"ema.{i}"])
        load_optimizer_tensors(self.optimizer, strip_prefix("optimizer", tensors))
        self.step = int(meta["step"])

    def save(self) -> None:
        tensors = {f"model.{i}": p for i, p in enumerate(self.parameters)} | {
            f"ema.{i}": p for i, p in enumerate(self.ema)
        }
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        save_checkpoint(self.folder, tensors, {"step": self.step, "config": asdict(self.config)})

    def learning_rate(self, step: int) -> float:
        c = self.config
        warm = min(1.0, (step + 1) / c.warmup)
        return c.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / c.steps)))

    def run(self, report: Callable[[int, dict[str, float]], None] = lambda step, values: None) -> None:
        """Train to ``config.steps``; ``report(step, values)`` after every step (it may checkpoint to elsewhere)."""
        c = self.config
        batches = epoch_batches(self.count, c.batch_size, c.seed, self.step)
        while self.step < c.steps:
            # this worker's share of the global batch, with noise of its own
            indices = next(batches)[self.rank :: self.world]
            generator = torch.Generator().manual_seed((c.seed * 1_000_003 + self.step) * 64 + self.rank)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            device_type = self.parameters[0].device.type
            with torch.autocast(device_type, torch.bfloat16, enabled=c.compute_dtype == "bfloat16"):
                loss, parts = self.stage(indices, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, c.clip_norm)
            self.optimizer.step()
            self.step += 1
            decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, list[Tensor](self.parameters), 1 - decay)
            if self.rank == 0 and (self.step % c.checkpoint_every == 0 or self.step == c.steps):
                self.save()
            report(self.step, {"loss": float(loss.detach()), "grad_norm": float(norm), **parts})

    def use_ema(self) -> None:
        """Put the averaged weights into the stage's modules (end of training)."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                parameter.copy_(average)
