"""The best denoiser if every code number were linear in the face plus Gaussian noise of its own: where the network begins.

    p(x0 | face) = N((e - mean_e) W, left)      W by ridge regression; left (Z,): the variance that the face leaves open
    p(x0)        = N(0, all)                    codes are standardised: mean 0

With x_t = signal x0 + sigma noise, noise of variance n, the expected code is linear in what is known:

    E[x0 | x_t, face] = (signal v x_t + sigma² n m) / (signal² v + sigma² n),   m and v: mean and variance from above

The network adds what this leaves out. So it starts as good as the regression that it must beat, where a network that starts
from nothing spends a small corpus on finding that regression: the idea of preconditioning (Karras et al. 2022,
arXiv:2206.00364, section 5), with the face in the prior.

Axes: B batch, Z code size, C condition, T timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_diffusion.synthesis.baselines import Pairs, deviation_cosine, fit_ridge

SMALLEST_VARIANCE = 1e-3
POOLED_ROWS = 16  # a variance of few validation rows is drawn towards what all code numbers have in common


class LinearGuess(nn.Module):
    """Answers as a denoiser of `prediction_type` does. Nothing in it is trained; `fit` sets it.

    signal_T, sigma_T: of the schedule. noise_Z: variance of the prior's noise, of each code number.
    """

    mean_C: Tensor
    weight_CZ: Tensor
    left_Z: Tensor
    all_Z: Tensor
    signal_T: Tensor
    sigma_T: Tensor
    noise_Z: Tensor

    def __init__(
        self, condition_size: int, prediction_type: str, signal_T: Tensor, sigma_T: Tensor, noise_Z: Tensor
    ) -> None:
        super().__init__()
        code_size, self.prediction_type = len(noise_Z), prediction_type
        self.register_buffer("mean_C", torch.zeros(condition_size))
        self.register_buffer("weight_CZ", torch.zeros(condition_size, code_size))
        self.register_buffer("left_Z", torch.ones(code_size))
        self.register_buffer("all_Z", torch.ones(code_size))
        for name, tensor in {"signal_T": signal_T, "sigma_T": sigma_T, "noise_Z": noise_Z}.items():
            self.register_buffer(name, tensor.clone(), persistent=False)

    @torch.no_grad()
    def fit(self, train: Pairs, validation: Pairs) -> float:
        """From embeddings (B, C) and codes (B, Z). Returns the mean cosine of predicted and true codes of `validation`.

        These rows choose the penalty, with a factor that undoes its shrinking, by squared error; and they tell `left_Z`: a
        regression leaves less open of the rows that it was fitted on.

        Raises ValueError for fewer than two rows, or none to validate with.
        """
        rows = list(validation())
        if not rows:
            raise ValueError("no validation rows were given to the linear guess: set data.validation_fraction")
        faces_BC, codes_BZ = (torch.cat(parts) for parts in zip(*rows, strict=True))
        least = float("inf")
        for ridge in fit_ridge(train()):
            plain_BZ = (faces_BC - ridge.embedding_mean_C) @ ridge.weight_CM
            factor = max(0.0, float((plain_BZ * codes_BZ).sum() / plain_BZ.square().sum().clamp(min=1e-12)))
            error = float((factor * plain_BZ - codes_BZ).square().sum())
            if error < least:
                least, predicted_BZ = error, factor * plain_BZ
                self.mean_C.copy_(ridge.embedding_mean_C)
                self.weight_CZ.copy_(factor * ridge.weight_CM)
        count, square_Z = 0, torch.zeros_like(self.all_Z)
        for _, some_BZ in train():
            count, square_Z = count + len(some_BZ), square_Z + some_BZ.square().sum(0)
        self.all_Z.copy_((square_Z / count).clamp(min=SMALLEST_VARIANCE))
        error_BZ, rows_B = (codes_BZ - predicted_BZ).square(), len(codes_BZ)
        pooled_Z = self.all_Z * (error_BZ.mean() / codes_BZ.square().mean().clamp(min=1e-12))
        left_Z = (error_BZ.sum(0) + POOLED_ROWS * pooled_Z) / (rows_B + POOLED_ROWS)
        self.left_Z.copy_(left_Z.clamp(min=SMALLEST_VARIANCE))
        return deviation_cosine(predicted_BZ, codes_BZ, torch.zeros_like(self.all_Z))

    def forward(
        self, noisy_BZ: Tensor, timesteps_B: Tensor, condition_BC: Tensor | None, drop_B: Tensor | None
    ) -> Tensor:
        """(B, Z), as `Denoiser.forward`; in float32 under autocast, too."""
        with torch.autocast(noisy_BZ.device.type, enabled=False):
            return self._answer(noisy_BZ, timesteps_B, condition_BC, drop_B)

    def _answer(
        self, noisy_BZ: Tensor, timesteps_B: Tensor, condition_BC: Tensor | None, drop_B: Tensor | None
    ) -> Tensor:
        if condition_BC is None:
            mean_BZ, variance_BZ = torch.zeros_like(noisy_BZ), self.all_Z
        else:
            mean_BZ, variance_BZ = (condition_BC - self.mean_C) @ self.weight_CZ, self.left_Z
            if drop_B is not None:
                mean_BZ = torch.where(drop_B[:, None], 0.0, mean_BZ)
                variance_BZ = torch.where(drop_B[:, None], self.all_Z, self.left_Z)
        signal_B1, sigma_B1 = self.signal_T[timesteps_B][:, None], self.sigma_T[timesteps_B][:, None]
        noise_BZ = sigma_B1.square() * self.noise_Z
        code_BZ = (signal_B1 * variance_BZ * noisy_BZ + noise_BZ * mean_BZ) / (
            signal_B1.square() * variance_BZ + noise_BZ
        )
        if self.prediction_type == "sample":
            return code_BZ
        epsilon_BZ = (noisy_BZ - signal_B1 * code_BZ) / sigma_B1
        return epsilon_BZ if self.prediction_type == "epsilon" else signal_B1 * epsilon_BZ - sigma_B1 * code_BZ
