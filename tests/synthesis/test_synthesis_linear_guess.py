"""The linear guess: the exact answer where codes are linear in the face plus Gaussian noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig, add_noise, diffusion_loss, sample_codes

TYPES = ["epsilon", "sample", "v_prediction"]
Z, C = 3, 12
CONFIG = DenoiserConfig(width=16, depth=1, condition_width=16, rank=1, generator_width=4, linear_guess=True)


def world(people: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings (P, C), codes (P, Z) and the codes' means (P, Z): linear in the face, with 0.1, 0.5, 1 of noise."""
    fixed, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    weight_CZ = 2 * torch.randn(C, Z, generator=fixed)
    faces_PC = torch.nn.functional.normalize(torch.randn(people, C, generator=generator), dim=1)
    means_PZ = faces_PC @ weight_CZ
    noise_PZ = torch.tensor([0.1, 0.5, 1.0]) * torch.randn(people, Z, generator=generator)
    return faces_PC, means_PZ + noise_PZ, means_PZ


def fitted(process: Diffusion) -> Denoiser:
    model = process.denoiser(Z, C, CONFIG).eval()
    assert model.guess is not None
    train, validation = world(20_000), world(2000, seed=1)
    cosine = model.guess.fit(lambda: [train[:2]], lambda: [validation[:2]])
    assert 0.8 < cosine < 1
    return model


def process(**values: Any) -> Diffusion:
    return Diffusion(DiffusionConfig(**values))


def test_what_the_face_leaves_open_is_measured() -> None:
    guess = fitted(process()).guess
    assert guess is not None
    torch.testing.assert_close(guess.left_Z, torch.tensor([0.01, 0.25, 1.0]), rtol=0.15, atol=0.005)
    torch.testing.assert_close(guess.all_Z, world(20_000)[1].square().mean(0))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_an_untrained_network_predicts_as_well_as_can_be(prediction_type: str) -> None:
    """Its loss is that of the true posterior mean, with the face and without it, and no smaller one exists."""
    diffusion = process(prediction_type=prediction_type)
    model = fitted(diffusion)
    faces_PC, codes_PZ, means_PZ = world(1000, seed=2)
    generator = torch.Generator().manual_seed(0)
    noise_PZ = torch.randn(1000, Z, generator=generator)
    timesteps_P = torch.randint(50, 1000, (1000,), generator=generator)
    noisy_PZ, target_PZ = add_noise(codes_PZ, noise_PZ, timesteps_P, diffusion)
    signal, sigma = (table[timesteps_P][:, None] for table in (diffusion.schedule.signal, diffusion.schedule.sigma))
    variance_Z = torch.tensor([0.01, 0.25, 1.0])
    code_PZ = (signal * variance_Z * noisy_PZ + sigma**2 * means_PZ) / (signal**2 * variance_Z + sigma**2)
    epsilon_PZ = (noisy_PZ - signal * code_PZ) / sigma
    best_PZ = {"epsilon": epsilon_PZ, "sample": code_PZ, "v_prediction": signal * epsilon_PZ - sigma * code_PZ}[
        prediction_type
    ]
    with torch.no_grad():
        answer_PZ = model(noisy_PZ, timesteps_P, faces_PC)
        hidden_PZ = model(noisy_PZ, timesteps_P, faces_PC, torch.ones(1000, dtype=torch.bool))
        assert torch.equal(hidden_PZ, model(noisy_PZ, timesteps_P, None))
    assert float((answer_PZ - best_PZ).abs().mean()) < 0.05
    errors = [float((x - target_PZ).square().mean()) for x in (best_PZ, answer_PZ, hidden_PZ)]
    assert errors[1] < 1.03 * errors[0]
    assert errors[2] > 1.3 * errors[1]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("prior", ["gaussian", "corpus"])
def test_samples_have_the_mean_and_the_spread_of_the_face(prediction_type: str, prior: str) -> None:
    factor = torch.diag(torch.tensor([1.5, 0.5, 1.0])) if prior == "corpus" else None
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, prior=prior), factor)  # type: ignore[arg-type]
    model = fitted(diffusion)
    faces_PC, _, means_PZ = world(1, seed=3)
    samples_SZ = sample_codes(model, faces_PC.expand(400, -1), range(400), 1.0, 100, diffusion=diffusion)
    torch.testing.assert_close(samples_SZ.mean(0), means_PZ[0], rtol=0.1, atol=0.15)
    torch.testing.assert_close(samples_SZ.std(0), torch.tensor([0.1, 0.5, 1.0]), rtol=0.25, atol=0.02)


def test_at_temperature_0_every_seed_gives_the_mean() -> None:
    diffusion = process(prediction_type="epsilon")
    model = fitted(diffusion)
    faces_PC, _, means_PZ = world(4, seed=4)
    cold, other = (
        sample_codes(model, faces_PC, seeds, 1.0, 50, temperature=0.0, diffusion=diffusion)
        for seeds in (range(4), range(4, 8))
    )
    assert torch.equal(cold, other)
    torch.testing.assert_close(cold, means_PZ, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="temperature"):
        sample_codes(model, faces_PC, range(4), temperature=-1.0, diffusion=diffusion)


def test_the_network_learns_what_is_not_linear() -> None:
    torch.manual_seed(0)
    diffusion = process(prediction_type="sample")
    model = fitted(diffusion)
    faces_PC, codes_PZ, _ = world(2000)
    bend_P1 = 12 * faces_PC[:, :1].abs()
    codes_PZ = codes_PZ + bend_P1 - bend_P1.mean()  # no constant would help
    noise_PZ, timesteps_P = torch.randn(2000, Z), torch.randint(0, 1000, (2000,))

    def loss() -> Tensor:
        return diffusion_loss(model, codes_PZ, faces_PC, noise_PZ, timesteps_P, None, diffusion).mean()

    before = float(loss().detach())
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.8 * before


def test_few_validation_rows_do_not_turn_the_prediction_round() -> None:
    for seed in range(8):
        guess = process().denoiser(Z, C, CONFIG).guess
        assert guess is not None
        train, validation = world(36, seed=seed), world(4, seed=100 + seed)
        noise = torch.Generator().manual_seed(seed)
        weak = [
            (faces, 0.3 * codes + torch.randn(codes.shape, generator=noise)) for faces, codes, _ in (train, validation)
        ]
        guess.fit(lambda w=weak: [w[0]], lambda w=weak: [w[1]])  # type: ignore[misc]
        true_CZ = torch.linalg.lstsq(*world(5000)[:2]).solution
        assert float((guess.weight_CZ * true_CZ).sum()) >= 0
        assert float(guess.left_Z.max() / guess.left_Z.min()) < 6


def test_without_validation_rows_there_is_no_guess() -> None:
    guess = process().denoiser(Z, C, CONFIG).guess
    assert guess is not None
    with pytest.raises(ValueError, match="validation"):
        guess.fit(lambda: [world(10)[:2]], lambda: [])
