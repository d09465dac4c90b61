"""What a fine-tuning step asks the model: which timesteps and noise it draws, what it must predict, how it is weighed.

Axes: K identities together, n samples of one identity in one step, C latent channels, H / W latent cells.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of the base model: `x_t = signal_t x_0 + sigma_t noise`, signal² + sigma² = 1."""

    signal: Tensor
    sigma: Tensor
    prediction_type: str

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device) -> "NoiseSchedule":
        """From a diffusers scheduler; computed in float64, kept in float32.

        Raises:
            ValueError: the scheduler has no `alphas_cumprod` (flow matching), or an unknown prediction type.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod; a DDPM-like scheduler is needed")
        if scheduler.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {scheduler.config.prediction_type!r}, not one of {PREDICTION_TYPES}")
        alphas_cumprod = scheduler.alphas_cumprod.double()
        signal, sigma = alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()
        return cls(signal.to(device), sigma.to(device), scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.signal)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target) for clean latents and noise (..., C, H, W) at timesteps (...)."""
        signal, sigma = (table[timesteps][..., None, None, None] for table in (self.signal, self.sigma))
        x_t = signal * x0 + sigma * noise
        if self.prediction_type == "epsilon":
            return x_t, noise
        if self.prediction_type == "sample":
            return x_t, x0
        return x_t, signal * noise - sigma * x0  # v (Salimans & Ho 2022, arXiv:2202.00512, appendix D)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Loss weights of Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""
        snr = (self.signal[timesteps] / self.sigma[timesteps]).square()
        clipped = snr.clamp(max=gamma)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)  # = clipped / snr, and 1 where the signal is gone
        return clipped if self.prediction_type == "sample" else clipped / (snr + 1)


@dataclass(frozen=True)
class TimestepSampler:
    """Timesteps in [low, high), uniform; `stratified` spreads the samples of one identity evenly over the range.

    A stratified sample is still uniform at each place, but a step of n samples sees n different noise levels, which
    lowers the variance of its gradient.
    """

    low: int
    high: int
    kind: Literal["uniform", "stratified"]

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        if self.kind == "uniform":
            u = torch.rand(n, generator=generator, dtype=torch.float64)
        else:
            u = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(n) / n) % 1
        return self.low + (u * (self.high - self.low)).long()


class RandomStreams:
    """Timesteps and noise for K identities, drawn on the CPU: the same numbers on every device.

    Common random numbers: all identities see one stream, so that their LoRAs differ by the person and not by luck.
    Otherwise each has a stream of its own, that hangs on the seed and its name and on nothing else. Either way the
    numbers of an identity are the same in whatever company it is trained.
    """

    def __init__(self, identities: Sequence[str], seed: int, common: bool) -> None:
        self.K = len(identities)
        seeds = [seed] if common else [identity_seed(seed, identity) for identity in identities]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, shape: tuple[int, int, int], sizes: Sequence[int], sample: TimestepSampler) -> tuple[Tensor, Tensor]:
        """Timesteps (K, n) and noise (K, n, C, H, W) with n = sum(sizes); each size is stratified on its own."""
        draws = []
        for generator in self.generators:
            timesteps_n = torch.cat([sample(size, generator) for size in sizes])
            draws.append((timesteps_n, torch.randn(len(timesteps_n), *shape, generator=generator)))
        timesteps_Kn, noise_KnCHW = (torch.stack(parts) for parts in zip(*draws, strict=True))
        return timesteps_Kn.expand(self.K, -1), noise_KnCHW.expand(self.K, -1, -1, -1, -1)


def identity_seed(seed: int, identity: str) -> int:
    """A seed of its own for each identity, the same on every machine (Python's `hash` is not)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "big") >> 1
