"""Diffusion over codes: noise and targets for training, and sampling by diffusers' schedulers.

    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) noise          (Ho et al. 2020, arXiv:2006.11239, equation 4)

The network answers with the noise (epsilon), the code (sample, the paper's "x0") or the velocity v = √ᾱ_t noise -
√(1 - ᾱ_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512). Linear betas for all three: a schedule that ends at no signal at
all gives an epsilon network no way to find the code at the first step.

Prior: the noise is N(0, I), `gaussian`, or has the covariance of the corpus' codes, `corpus`, in training and sampling.

Axes: B batch, Z code size, C condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_diffusion.lora.objective import NoiseSchedule
from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.linear_guess import LinearGuess

LARGEST_PRIOR = 4096
MOST_TIMESTEPS = 1_000_000


@dataclass(frozen=True)
class DiffusionConfig:
    """condition_dropout: share of training rows whose face is hidden, for classifier-free guidance.

    min_snr_gamma: loss weights of Hang et al. 2023 (arXiv:2303.09556); None: all timesteps alike.
    sampler: deterministic ones only, so that the noise of the start is all the chance there is.
    """

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"  # what the network predicts
    num_train_timesteps: int = 1000  # noise levels
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"  # as in diffusers
    beta_start: float = 1e-4  # of the schedule
    beta_end: float = 0.02  # of the schedule
    prior: Literal["gaussian", "corpus"] = "gaussian"  # noise N(0, I), or with the covariance of the corpus' latents
    condition_dropout: float = 0.1
    min_snr_gamma: float | None = None
    sampler: Literal["ddim", "dpm"] = "ddim"

    def __post_init__(self) -> None:
        if not 0 < self.num_train_timesteps <= MOST_TIMESTEPS or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"num_train_timesteps must lie in 1 .. {MOST_TIMESTEPS:,} and 0 < beta_start <= beta_end < 1"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}; it must lie in 0 .. 1")


class Diffusion(nn.Module):
    """The forward process: schedule and prior. `factor_ZZ`: F with F Fᵀ = covariance of the corpus' codes, for its prior."""

    factor_ZZ: Tensor | None

    def __init__(self, config: DiffusionConfig, factor_ZZ: Tensor | None = None) -> None:
        from diffusers import DDPMScheduler  # here: diffusers takes seconds to import

        super().__init__()
        if (config.prior == "corpus") != (factor_ZZ is not None):
            raise ValueError(
                f"prior is {config.prior}, but a factor of the codes' covariance is "
                f"{'missing: make it with prior_factor(codes)' if factor_ZZ is None else 'given: it has no use there'}"
            )
        self.config = config
        self.scheduler: Any = DDPMScheduler(**self._schedule())
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler, torch.device("cpu"))
        self.register_buffer("factor_ZZ", factor_ZZ)

    def noise(self, white_BZ: Tensor) -> Tensor:
        """Noise of the prior from N(0, I)."""
        return white_BZ if self.factor_ZZ is None else white_BZ @ self.factor_ZZ.T

    def denoiser(self, code_size: int, condition_size: int, config: DenoiserConfig) -> Denoiser:
        """A new network for this process."""
        guess = None
        if config.linear_guess:
            noise_Z = torch.ones(code_size) if self.factor_ZZ is None else self.factor_ZZ.square().sum(1)
            schedule = self.schedule
            guess = LinearGuess(
                condition_size, self.config.prediction_type, schedule.signal, schedule.sigma, noise_Z.cpu()
            )
        return Denoiser(code_size, condition_size, config, guess)

    def sampler(self) -> Any:
        """A new scheduler for one call of `sample_codes`: DPM-Solver keeps state from step to step."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        if self.config.sampler == "dpm":
            return DPMSolverMultistepScheduler(**self._schedule(), timestep_spacing="trailing", lower_order_final=True)
        return DDIMScheduler(**self._schedule(), timestep_spacing="trailing", clip_sample=False)

    def _schedule(self) -> dict[str, Any]:
        c = self.config
        return {
            "num_train_timesteps": c.num_train_timesteps,
            "beta_start": c.beta_start,
            "beta_end": c.beta_end,
            "beta_schedule": c.beta_schedule,
            "prediction_type": c.prediction_type,
        }


def prior_factor(codes_PZ: Tensor) -> Tensor:
    """F (Z, Z) with F Fᵀ = covariance of the codes. Raises ValueError for codes too long for such a matrix."""
    if codes_PZ.shape[1] > LARGEST_PRIOR:
        raise ValueError(
            f"prior: corpus needs a {codes_PZ.shape[1]} × {codes_PZ.shape[1]} matrix; use it with latent or pca codes of at "
            f"most {LARGEST_PRIOR} numbers, or prior: gaussian"
        )
    centred = codes_PZ.double() - codes_PZ.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    # row by row in memory, as a file gives it back: products of other strides differ in the last bit
    return (vectors * values.clamp(min=0).sqrt()).float().contiguous()


def diffusion_loss(
    denoiser: nn.Module,
    codes_BZ: Tensor,
    condition_BC: Tensor | None,
    noise_BZ: Tensor,
    timesteps_B: Tensor,
    drop_B: Tensor | None,
    diffusion: Diffusion,
) -> Tensor:
    """Squared error of the prediction, (B,), meaned over the code and weighted. All chance comes in from outside."""
    noisy_BZ, target_BZ = add_noise(codes_BZ, noise_BZ, timesteps_B, diffusion)
    answer_BZ = denoiser(noisy_BZ, timesteps_B, condition_BC, drop_B)
    error_B = (answer_BZ.float() - target_BZ).square().mean(1)
    gamma = diffusion.config.min_snr_gamma
    if gamma is None:
        return error_B
    return error_B * diffusion.schedule.min_snr_weights(timesteps_B.cpu(), gamma).to(error_B.device)


def add_noise(codes_BZ: Tensor, noise_BZ: Tensor, timesteps_B: Tensor, diffusion: Diffusion) -> tuple[Tensor, Tensor]:
    """the noisy codes and what the network should predict, (B, Z) both."""
    scheduler = diffusion.scheduler
    noisy_BZ = scheduler.add_noise(codes_BZ, noise_BZ, timesteps_B)
    if diffusion.config.prediction_type == "epsilon":
        return noisy_BZ, noise_BZ
    if diffusion.config.prediction_type == "sample":
        return noisy_BZ, codes_BZ
    return noisy_BZ, scheduler.get_velocity(codes_BZ, noise_BZ, timesteps_B)


@torch.no_grad()
def sample_codes(
    denoiser: Denoiser,
    condition_BC: Tensor | None,
    seeds_B: Sequence[int],
    guidance_scale: float = 1.0,
    num_inference_steps: int = 25,
    temperature: float = 1.0,
    *,
    diffusion: Diffusion,
) -> Tensor:
    """Codes (B, Z), one for each seed, on the denoiser's device.

    Each sample's noise comes from its own generator on the CPU, so a sample is the same alone and in any batch, up to float
    error (matrix products round differently for different batch sizes), and bit for bit in the same batch.

    Args:
        condition_BC: unit embeddings, or None to sample without a face.
        guidance_scale: g in `nobody + g (somebody - nobody)`; 1 is the conditional prediction alone, and costs half.
        temperature: factor of the starting noise. Below 1, samples are alike and nearer to what is typical of the face.

    Raises:
        ValueError: another number of conditions than seeds, or steps out of range.
    """
    if condition_BC is not None and len(condition_BC) != len(seeds_B):
        raise ValueError(f"{len(condition_BC)} embeddings but {len(seeds_B)} seeds: give one seed for each sample")
    if not 1 <= num_inference_steps <= diffusion.config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}; it must lie in 1 .. {diffusion.config.num_train_timesteps}"
        )
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative")
    device = denoiser.no_face_W.device
    if not len(seeds_B):
        return torch.zeros(0, denoiser.code_size, device=device)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds_B]
    white_BZ = torch.stack([torch.randn(denoiser.code_size, generator=generator) for generator in generators])
    start_BZ = temperature * diffusion.noise(white_BZ.to(device))
    return denoise(denoiser, start_BZ, condition_BC, guidance_scale, num_inference_steps, diffusion=diffusion)


def denoise(
    denoiser: Denoiser,
    start_BZ: Tensor,
    condition_BC: Tensor | None,
    guidance_scale: float,
    num_inference_steps: int,
    *,
    diffusion: Diffusion,
) -> Tensor:
    """Codes (B, Z) from the noise that each begins with, with gradients; the rest as in `sample_codes`."""
    x_BZ, device = start_BZ, start_BZ.device
    scheduler = diffusion.sampler()
    scheduler.set_timesteps(num_inference_steps)
    batch = len(x_BZ)
    guided = condition_BC is not None and guidance_scale != 1
    if guided:
        assert condition_BC is not None
        condition_BC = torch.cat([condition_BC, condition_BC])
        drop_B = torch.arange(2 * batch, device=device) >= batch
    for t in scheduler.timesteps:
        timesteps = t.to(device).expand(2 * batch if guided else batch)
        if guided:
            somebody_BZ, nobody_BZ = denoiser(x_BZ.repeat(2, 1), timesteps, condition_BC, drop_B).float().chunk(2)
            answer_BZ = nobody_BZ + guidance_scale * (somebody_BZ - nobody_BZ)
        else:
            answer_BZ = denoiser(x_BZ, timesteps, condition_BC).float()
        x_BZ = scheduler.step(answer_BZ, t, x_BZ).prev_sample
    return x_BZ


@torch.no_grad()
def score_codes(
    denoiser: Denoiser, codes_BZ: Tensor, condition_BC: Tensor, rounds: int = 16, *, diffusion: Diffusion
) -> Tensor:
    """(B,): how much better the denoiser finds each code back when it sees the face; higher is better.

    Mean of `error without the face - error with it` over `rounds` timesteps, with the same noise for all rows: an
    estimate, up to weights, of log p(code | face) - log p(code) (Li et al. 2023, arXiv:2303.16203, section 3). Errors are
    those of the predicted code times √ᾱ, so that neither end of the schedule, where the face tells nothing, drowns the
    middle. Costs 2 × rounds evaluations of a small network and no render: the cheap choice among samples of one face.
    """
    total, device = diffusion.config.num_train_timesteps, codes_BZ.device
    generator = torch.Generator().manual_seed(0)
    score_B = torch.zeros(len(codes_BZ), device=device)
    for i in range(rounds):
        t = int((i + 0.5) * total / rounds)
        signal, sigma = float(diffusion.schedule.signal[t]), float(diffusion.schedule.sigma[t])
        # what turns an error of the answer into one of √ᾱ x0, the noisy code staying as it is
        factor = {"epsilon": sigma, "sample": signal, "v_prediction": signal * sigma}[diffusion.config.prediction_type]
        timesteps_B = torch.full((len(codes_BZ),), t, device=device)
        noise_BZ = diffusion.noise(torch.randn(1, codes_BZ.shape[1], generator=generator).to(device)).expand_as(
            codes_BZ
        )
        noisy_BZ, target_BZ = add_noise(codes_BZ, noise_BZ, timesteps_B, diffusion)
        nobody, somebody = (
            (factor * (denoiser(noisy_BZ, timesteps_B, condition).float() - target_BZ)).square().mean(1)
            for condition in (None, condition_BC)
        )
        score_B += nobody - somebody
    return score_B / rounds
