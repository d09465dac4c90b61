"""The LoRA VAE: reconstruction, what the KL weight means, and the ways to keep it from learning by heart."""

from __future__ import annotations

import pytest
import torch
from synthesis_world import LAYOUT, Toy, toy
from torch import Tensor

from lora_diffusion.synthesis.codes import LatentCodes, PCACodes, reconstruction
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.vae import LoRAVAE, VAEConfig, kl_nats, latent_usage, vae_loss


def train(vae: LoRAVAE, x_PM: Tensor, steps: int, rate: float = 3e-3) -> list[float]:
    """Full batches of normalised parameters; returns the losses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        noise_BZ = torch.randn(len(x_PM), vae.config.latent_size, generator=generator)
        noise_BM = torch.randn(x_PM.shape, generator=generator)
        loss_B, _ = vae_loss(x_PM, *vae(x_PM, noise_BZ, noise_BM), vae.config.kl_weight)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss_B.detach().mean()))
    vae.eval()
    return losses


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(latent_size=8, hidden=(64, 32), linear_skip=False, dropout=0, input_noise=0, kl_weight=0.02),
        VAEConfig(latent_size=8, hidden=(64, 32), dropout=0.1, kl_weight=0.02),
        VAEConfig(latent_size=8, hidden=(), kl_weight=0.02),
    ],
    ids=["layers", "layers and linear", "linear"],
)
def test_the_loss_falls_and_unseen_people_come_back(config: VAEConfig) -> None:
    data, unseen = toy(300), toy(60, seed=1)
    torch.manual_seed(0)
    vae = LoRAVAE(config, data.normaliser)
    losses = train(vae, data.normaliser.normalise(data.vectors_PN), 300)
    assert losses[-1] < 0.2 * losses[0]
    assert reconstruction(LatentCodes(vae), [unseen.vectors_PN]).r2 > 0.9


def test_kl_weight_is_twice_the_variance_below_which_a_direction_is_left_out() -> None:
    """Variances 5, 3, 1.5 | 0.3, 0.1 of orthogonal directions, and a KL weight of 1: the first three are used.

    The law of probabilistic PCA, and what the docstring of `vae.py` says of the unit of `kl_weight`.
    """
    variances = torch.tensor([5.0, 3.0, 1.5, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    x_PM = torch.randn(600, 5, generator=generator)
    x_PM = torch.linalg.qr(x_PM - x_PM.mean(0))[0] * 600**0.5 * variances.sqrt()  # exactly these variances
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    torch.manual_seed(0)
    vae = LoRAVAE(
        VAEConfig(latent_size=5, hidden=(), kl_weight=1.0, input_noise=0), Normaliser(torch.zeros(5), torch.ones(5))
    )
    train(vae, x_PM @ rotation, 800, rate=2e-2)
    active, kl_Z = latent_usage(vae, (x_PM @ rotation).split(100))
    assert active == 3
    # they carry half the logarithm of how far they stand out
    assert float(kl_Z.sum()) == pytest.approx(float(0.5 * (variances[:3] / 0.5).log().sum()), rel=0.12)


def test_a_vae_that_starts_from_pca_reconstructs_as_well() -> None:
    data = toy()
    pca = data.pca(4)
    vae = LoRAVAE(VAEConfig(latent_size=7, hidden=(12,)), data.normaliser).eval()
    vae.start_from_pca(pca)
    of_vae = reconstruction(LatentCodes(vae), [data.vectors_PN])
    of_pca = reconstruction(PCACodes(data.normaliser, pca), [data.vectors_PN])
    assert of_vae.r2 == pytest.approx(of_pca.r2, abs=1e-5)
    mean_PZ, _ = vae.encode(data.vectors_PN)
    torch.testing.assert_close(mean_PZ[:, :4].var(0, correction=0), torch.ones(4), rtol=1e-3, atol=0)
    assert not mean_PZ[:, 4:].any()


def test_a_heavy_kl_weight_empties_the_latent() -> None:
    data = toy()
    torch.manual_seed(0)
    vae = LoRAVAE(VAEConfig(latent_size=4, hidden=(), kl_weight=1000.0, input_noise=0), data.normaliser)
    train(vae, data.normaliser.normalise(data.vectors_PN), 400, rate=5e-2)
    active, kl_Z = latent_usage(vae, [data.vectors_PN])
    assert active == 0
    assert (kl_Z >= 0).all()


def test_kl_is_zero_for_the_prior_and_only_there() -> None:
    zero = torch.zeros(1, 3)
    assert not kl_nats(zero, zero).any()
    assert (kl_nats(zero + 0.1, zero) > 0).all()
    assert (kl_nats(zero, zero - 0.1) > 0).all()
    q = torch.distributions.Normal(torch.tensor(0.7), torch.tensor(0.4))
    p = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    ours = kl_nats(torch.tensor([[0.7]]), torch.tensor([[2 * torch.tensor(0.4).log()]]))
    torch.testing.assert_close(ours[0, 0], torch.distributions.kl_divergence(q, p))


def test_the_loss_is_of_each_row_alone() -> None:
    x_BM, output_BM = torch.randn(6, 4), torch.randn(6, 4)
    mean_BZ, logvar_BZ = torch.randn(6, 2), torch.randn(6, 2)
    loss_B, parts = vae_loss(x_BM, output_BM, mean_BZ, logvar_BZ, 0.5)
    alone = torch.cat(
        [
            vae_loss(x_BM[i : i + 1], output_BM[i : i + 1], mean_BZ[i : i + 1], logvar_BZ[i : i + 1], 0.5)[0]
            for i in range(6)
        ]
    )
    torch.testing.assert_close(loss_B, alone)
    torch.testing.assert_close(loss_B, parts["reconstruction"] + 0.5 / 4 * parts["kl"])


def test_noise_and_dropout_are_of_training_only() -> None:
    data = toy()
    vae = LoRAVAE(VAEConfig(latent_size=4, hidden=(16,), dropout=0.5, linear_skip=False), data.normaliser)
    space = LatentCodes(vae)
    space.train()  # a denoiser's training must not wake the dropout of the frozen VAE
    assert torch.equal(space.encode(data.vectors_PN), space.encode(data.vectors_PN))
    assert not any(p.requires_grad for p in space.parameters())


def test_vectors_come_out_as_long_as_they_went_in() -> None:
    data: Toy = toy()
    vae = LoRAVAE(VAEConfig(latent_size=5, hidden=(16, 8)), data.normaliser)
    mean_BZ, logvar_BZ = vae.encode(data.vectors_PN[:3])
    assert mean_BZ.shape == logvar_BZ.shape == (3, 5)
    assert vae.normaliser.restore(vae.decode_normalised(mean_BZ)).shape == (3, LAYOUT.size)


def test_widths_fall_in_the_encoder_and_rise_in_the_decoder() -> None:
    vae = LoRAVAE(VAEConfig(latent_size=5, hidden=(32, 16)), toy().normaliser)
    assert vae.encoder is not None
    assert vae.decoder is not None
    widths = [
        [layer.out_features for layer in net if isinstance(layer, torch.nn.Linear)]
        for net in (vae.encoder, vae.decoder)
    ]
    assert widths == [[32, 16, 10], [16, 32, vae.normaliser.size]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": (8, 16)}, "must fall"),
        ({"hidden": (), "linear_skip": False}, "nothing to learn"),
        ({"latent_size": 0}, "positive"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**values)  # type: ignore[arg-type]
