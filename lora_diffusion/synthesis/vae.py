"""LoRA VAE: a vector of N parameters <-> a latent of Z numbers (LoRA Diffusion, arXiv:2412.02352, Figure 4a).

"LoRA weights are flattened into one large vector and fed through sequential MLPs of progressively decreasing
dimensions in the encoder, and expanded back in the decoder"; their latent has 512 numbers. Normaliser inside, so that
vectors go in and come out as they are. Widths, activation, loss weights and the linear path are ours.

The loss of a row, for M normalised parameters:

    1/M Σ_m (x̂_m - x_m)²  +  β/M Σ_z KL( N(μ_z, σ_z²) || N(0, 1) )

It is the negative evidence bound of a Gaussian decoder of variance β/2, times β/M: so `kl_weight` β has a unit. Twice the
variance that one normalised parameter has beyond what a latent can know, and directions of the corpus with less
variance than β/2 are left out of the latent (Tipping & Bishop 1999, for the linear case).

State: the first layer of the encoder and the last one of the decoder hold nearly all parameters, 2 M (H₁ + Z) for
the first hidden width H₁ with the linear path. M = 99,648, hidden (1024, 768), Z = 512: 309 M parameters, 1.24 GB in float32;
with gradients, AdamW's two moments and the moving average 6.2 GB a worker under DDP, that over the workers under FSDP.

Axes: B batch, N vector length, M varying parameters, Z latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA


@dataclass(frozen=True)
class VAEConfig:
    """Sizes and regularisation. With few rows (some thousands) a VAE learns them by heart: then a narrow `hidden`,
    dropout and input noise, or only the linear path.

    hidden: widths of the encoder's layers, falling; the decoder's are the same, mirrored. Empty: linear only.
    linear_skip: adds a linear map beside the layers, both ways; the layers then start at zero and learn the rest.
    kl_weight: β, the weight of the KL term. kl_warmup: share of the training over which it rises from 0.
    input_noise: standard deviation of noise on the normalised input, in training; the target stays clean.
    """

    latent_size: int = 512  # Z
    hidden: tuple[int, ...] = (1024, 768)
    linear_skip: bool = True
    dropout: float = 0.1  # in the hidden layers
    input_noise: float = 0.1
    kl_weight: float = 0.5
    kl_warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.latent_size < 1 or any(width < 1 for width in self.hidden):
            raise ValueError(f"latent_size {self.latent_size} and hidden {self.hidden} must be positive")
        if list(self.hidden) != sorted(self.hidden, reverse=True):
            raise ValueError(f"hidden is {self.hidden}; the encoder's widths must fall")
        if not self.hidden and not self.linear_skip:
            raise ValueError("hidden is empty and linear_skip is off: there is nothing to learn; switch one on")
        if not 0 <= self.dropout < 1 or not 0 <= self.kl_warmup <= 1 or self.kl_weight < 0 or self.input_noise < 0:
            raise ValueError("dropout and kl_warmup must lie in 0..1, kl_weight and input_noise must not be negative")


class LoRAVAE(nn.Module):
    """`encode`: vectors (B, N) -> mean and log variance (B, Z); `decode`: latents (B, Z) -> vectors (B, N)."""

    def __init__(self, config: VAEConfig, normaliser: Normaliser) -> None:
        super().__init__()
        self.config, self.normaliser = config, normaliser
        M, Z = normaliser.size, config.latent_size
        self.encoder = _mlp(M, config.hidden, 2 * Z, config.dropout) if config.hidden else None
        self.decoder = _mlp(Z, config.hidden[::-1], M, config.dropout) if config.hidden else None
        self.skip_in = nn.Linear(M, Z) if config.linear_skip else None
        self.skip_out = nn.Linear(Z, M) if config.linear_skip else None
        self.logvar_Z = nn.Parameter(torch.full((Z,), -3.0))
        if self.encoder is not None and self.decoder is not None and config.linear_skip:
            for network in (self.encoder, self.decoder):  # beside a linear path: start at zero, learn what it cannot
                last = network[-1]
                assert isinstance(last, nn.Linear)
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    @torch.no_grad()
    def start_from_pca(self, pca: PCA) -> None:
        """Let the linear path begin as the PCA of the normalised corpus: each latent a component, at unit variance.

        Raises ValueError without a linear path or with a PCA of other columns.
        """
        if self.skip_in is None or self.skip_out is None:
            raise ValueError("the VAE has no linear path to start from a PCA: set linear_skip: true")
        if pca.components_KM.shape[1] != self.normaliser.size:
            raise ValueError(
                f"the PCA has {pca.components_KM.shape[1]} columns, the VAE {self.normaliser.size}: fit it on normalised vectors"
            )
        K = min(len(pca), self.config.latent_size)
        std_K1 = pca.explained_variance_K[:K, None].clamp(min=1e-12).sqrt()
        for layer in (self.skip_in, self.skip_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.skip_in.weight[:K] = pca.components_KM[:K] / std_K1
        self.skip_in.bias[:K] = -(self.skip_in.weight[:K] @ pca.mean_M)
        self.skip_out.weight[:, :K] = (pca.components_KM[:K] * std_K1).T
        self.skip_out.bias.copy_(pca.mean_M)

    def encode(self, vectors_BN: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_normalised(self.normaliser.normalise(vectors_BN))

    def encode_normalised(self, x_BM: Tensor) -> tuple[Tensor, Tensor]:
        mean_BZ: Tensor | int = 0
        logvar_BZ = self.logvar_Z.expand(len(x_BM), -1)
        if self.encoder is not None:
            mean_BZ, change_BZ = self.encoder(x_BM).float().chunk(2, dim=1)
            logvar_BZ = logvar_BZ + change_BZ
        if self.skip_in is not None:
            mean_BZ = mean_BZ + self.skip_in(x_BM).float()
        assert isinstance(mean_BZ, Tensor)
        return mean_BZ, logvar_BZ.clamp(-12, 6)

    def decode_normalised(self, latents_BZ: Tensor) -> Tensor:
        parts = [network(latents_BZ).float() for network in (self.decoder, self.skip_out) if network is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def forward(
        self, x_BM: Tensor, noise_BZ: Tensor, input_noise_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, M) of normalised parameters through a sampled latent; mean and log variance (B, Z)."""
        seen_BM = x_BM if input_noise_BM is None else x_BM + self.config.input_noise * input_noise_BM
        mean_BZ, logvar_BZ = self.encode_normalised(seen_BM)
        return self.decode_normalised(mean_BZ + (0.5 * logvar_BZ).exp() * noise_BZ), mean_BZ, logvar_BZ


def kl_nats(mean_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL divergence from the prior N(0, 1), nats, of each latent number (B, Z)."""
    return 0.5 * (mean_BZ.square() + logvar_BZ.exp() - 1 - logvar_BZ)


def vae_loss(
    x_BM: Tensor, output_BM: Tensor, mean_BZ: Tensor, logvar_BZ: Tensor, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each row (B,), as in this module's docstring, and its parts."""
    error_B = (output_BM.float() - x_BM).square().mean(1)
    kl_B = kl_nats(mean_BZ, logvar_BZ).sum(1)
    return error_B + kl_weight / x_BM.shape[1] * kl_B, {"reconstruction": error_B, "kl": kl_B}


@torch.no_grad()
def latent_usage(vae: LoRAVAE, chunks: Iterable[Tensor], threshold: float = 0.01) -> tuple[int, Tensor]:
    """How many latent numbers carry more than `threshold` nats, and the mean KL of each (Z,), over vectors (B, N)."""
    total_Z, count = torch.zeros(vae.config.latent_size, dtype=torch.float64), 0
    for vectors_BN in chunks:
        total_Z += kl_nats(*vae.encode(vectors_BN)).double().sum(0).cpu()
        count += len(vectors_BN)
    mean_Z = total_Z / max(1, count)
    return int((mean_Z > threshold).sum()), mean_Z.float()


def _mlp(inputs: int, hidden: Sequence[int], outputs: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
