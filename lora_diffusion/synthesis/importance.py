"""Which parameters of a LoRA the pictures feel: weights for the reconstruction loss of the VAE.

An error of the same size matters in one parameter and hardly in another. To second order, an error d of a vector v changes
the base model's prediction ε̂ by |J d|², J = ∂ε̂/∂v; for errors that are independent of each other that is Σ_n d_n² w_n with
w = diag(Jᵀ J), averaged over photos, noise and timesteps. It is estimated with random signs u: E[(∂(u·ε̂)/∂v_n)²] = w_n
(Hutchinson 1990). The bank gives each sample its own row of gradients, so many samples are one backward pass.

Axes: S samples together, N vector length, M varying parameters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.normaliser import Normaliser


def output_weights(
    base: BaseModel,
    layout: LoRALayout,
    vector_N: Tensor,
    pixels: NDArray[np.uint8],
    prompt: str = "a photo of sks person",
    samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """(N,) mean squared change of the model's prediction (mean over its entries) for a unit change of each parameter.

    Args:
        vector_N: where to look, such as the corpus' mean; with B = 0 nothing feels A.
        pixels: photos, uint8 RGB (P, H, W, 3) in the size of the base model; noise is added to them.
    """
    layout.check(vector_N[None])
    latents, schedule = base.encode_images(pixels), NoiseSchedule.from_scheduler(base.scheduler, base.device)
    text, bank = base.encode_prompts([prompt]).to(base.dtype), LoRABank(base.unet, layout)
    generator = torch.Generator().manual_seed(seed)
    total_N = torch.zeros(layout.size, dtype=torch.float64)
    for start in range(0, samples, batch_size):
        S = min(batch_size, samples - start)
        x0 = latents[torch.randint(0, len(latents), (S,), generator=generator).to(base.device)]
        timesteps_S = (
            ((torch.rand(S, generator=generator) + torch.arange(S)) / S * len(schedule)).long().to(base.device)
        )
        noise = torch.randn(x0.shape, generator=generator).to(base.device)
        signs = (torch.randint(0, 2, x0.shape, generator=generator) * 2.0 - 1.0).to(base.device)
        vectors_SN = vector_N.to(base.device, torch.float32).repeat(S, 1).requires_grad_()
        noisy, _ = schedule.question(x0, noise, timesteps_S)
        with bank.active(vectors_SN):
            answer = base.unet(
                noisy.to(base.dtype), timesteps_S, encoder_hidden_states=text.expand(S, -1, -1), return_dict=False
            )[0]
            (answer.float() * signs).sum().backward()
        assert vectors_SN.grad is not None
        total_N += vectors_SN.grad.double().square().sum(0).cpu() / x0[0].numel()
    return (total_N / samples).float()


def loss_weights(weights_N: Tensor, normaliser: Normaliser, floor: float = 0.01) -> Tensor:
    """(M,) the same for normalised parameters, mean 1: an error there is `std` times larger in the vector.

    `floor`: no parameter weighs less than this share of the mean, so that none is free to be anything.
    """
    varying = normaliser.varying.cpu()
    weights_M = weights_N.cpu()[varying] * normaliser.std_N.cpu()[varying].square()
    weights_M = weights_M / weights_M.mean().clamp(min=1e-30)
    weights_M = weights_M.clamp(min=floor)
    return weights_M / weights_M.mean()
