"""Invert: photos -> code, by gradient through the frozen base model. Refine: a few steps of fine-tuning from a synthesised LoRA.

Inversion asks which code's LoRA lets the base model denoise the photos best: the loss of fine-tuning, but only the code moves,
so that the answer lies in the space of people (weights2weights, arXiv:2406.09413, section 4.3: one image, 400 Adam steps).
As in fine-tuning, K people run in one forward pass, each as if alone.

Axes: K people, N vector length, Z code size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import Finetuner, FinetuneResult
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule, RandomStreams, TimestepSampler
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import CodeSpace


@dataclass(frozen=True)
class InversionConfig:
    """prior_weight: of |code|² / Z, which keeps the code where the corpus' people are (codes have unit variance)."""

    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 0.05
    prior_weight: float = 0.01
    prompt: str = "a photo of sks person"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not self.learning_rate > 0 or self.prior_weight < 0:
            raise ValueError(
                "steps and prior_weight must not be negative, batch_size and learning_rate must be positive"
            )


@dataclass(frozen=True, eq=False)
class InversionResult:
    """codes (K, Z); the denoising loss of every step (S, K)."""

    codes_KZ: Tensor
    loss_history_SK: NDArray[np.float32]


def invert(
    base: BaseModel,
    layout: LoRALayout,
    space: CodeSpace,
    people: Sequence[PersonPhotos],
    config: InversionConfig | None = None,
    start_KZ: Tensor | None = None,
) -> InversionResult:
    """The codes whose LoRAs explain the photos best, from `start_KZ` or from the corpus' mean (zeros).

    Everyone sees the same noise and timesteps. Raises ValueError for no people, photos of other sizes, or a start of another
    shape.
    """
    config = config or InversionConfig()
    if not people:
        raise ValueError("there is nobody to invert: give at least one person's photos")
    K, device = len(people), base.device
    if start_KZ is None:
        start_KZ = torch.zeros(K, space.size)
    if start_KZ.shape != (K, space.size):
        raise ValueError(f"the start has shape {tuple(start_KZ.shape)}; expected ({K}, {space.size})")
    codes_KZ = start_KZ.detach().to(device, torch.float32).clone().requires_grad_()
    there = next(chain(space.parameters(), space.buffers())).device
    optimizer = torch.optim.Adam([codes_KZ], lr=config.learning_rate)
    schedule = NoiseSchedule.from_scheduler(base.scheduler, device)
    timesteps_of = TimestepSampler(0, len(schedule), "stratified")
    streams = RandomStreams([person.identity for person in people], config.seed, common=True)
    latents = [base.encode_images(person.pixels) for person in people]
    captions = [person.captions or (config.prompt,) * len(person.pixels) for person in people]
    prompts = [base.encode_prompts(list(caption)).to(base.dtype) for caption in captions]
    shape: tuple[int, int, int] = tuple(latents[0].shape[1:])  # type: ignore[assignment]
    if any(tuple(part.shape[1:]) != shape for part in latents):
        raise ValueError("the people's photos have different sizes; all need the same")
    bank, losses = LoRABank(base.unet, layout), []
    for step in range(config.steps):
        place_n = step * config.batch_size + torch.arange(config.batch_size)
        x0 = torch.stack([part[(place_n % len(part)).to(device)] for part in latents])
        text = torch.cat([part[(place_n % len(part)).to(device)] for part in prompts])
        timesteps_Kn, noise = (t.to(device) for t in streams.draw(shape, [config.batch_size], timesteps_of))
        noisy, target = schedule.add_noise(x0, noise, timesteps_Kn)
        with bank.active(space.decode(codes_KZ.to(there)).to(device), config.batch_size):
            x = noisy.flatten(0, 1).to(base.dtype)
            prediction = base.unet(x, timesteps_Kn.flatten(), **base.conditioning(text, x), return_dict=False)[0]
            loss_K = (prediction.float().view_as(target) - target).square().mean((1, 2, 3, 4))
            # the sum over people, not the mean: a person's gradient must not depend on the company
            total = loss_K.sum() + config.prior_weight * codes_KZ.square().mean(1).sum()
            optimizer.zero_grad()
            total.backward()
        optimizer.step()
        losses.append(loss_K.detach())
    history = torch.stack(losses).cpu().numpy() if losses else np.empty((0, K), np.float32)
    return InversionResult(codes_KZ.detach().cpu(), history)


def refine(
    base: BaseModel,
    layout: LoRALayout,
    people: Sequence[PersonPhotos],
    start_KN: Tensor | NDArray[np.float32],
    steps: int,
    config: FinetuneConfig | None = None,
) -> FinetuneResult:
    """`steps` of fine-tuning from synthesised LoRAs; everything else as `config`, best that of the corpus' recipe."""
    config = config or FinetuneConfig()
    average_last = min(config.average_last, steps)
    tuner = Finetuner(base, layout, replace(config, steps=steps, average_last=average_last))
    return tuner(people, start_KN)
