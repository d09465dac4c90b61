"""Diffusion over codes: the right targets, samples that depend on their seed alone, and the truth on a toy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import (
    Diffusion,
    DiffusionConfig,
    add_noise,
    diffusion_loss,
    prior_factor,
    sample_codes,
    score_codes,
)

TYPES = ["epsilon", "sample", "v_prediction"]
Z, C = 6, 16


def diffusion(**values: Any) -> Diffusion:
    return Diffusion(DiffusionConfig(**values))


class Oracle(nn.Module):
    """Knows the one code that all data is."""

    def __init__(self, process: Diffusion, code_Z: Tensor) -> None:
        super().__init__()
        self.process, self.code_Z, self.code_size = process, code_Z, len(code_Z)
        self.no_face_W = code_Z

    def forward(self, x_BZ: Tensor, t_B: Tensor, condition_BC: Tensor | None, drop_B: Tensor | None = None) -> Tensor:
        signal, sigma = (table[t_B][:, None] for table in (self.process.schedule.signal, self.process.schedule.sigma))
        code = self.code_Z.expand_as(x_BZ)
        noise = (x_BZ - signal * code) / sigma
        kind = self.process.config.prediction_type
        return {"epsilon": noise, "sample": code, "v_prediction": signal * noise - sigma * code}[kind]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_has_no_loss(prediction_type: str) -> None:
    process = diffusion(prediction_type=prediction_type)
    code_Z = torch.randn(Z)
    loss_B = diffusion_loss(
        Oracle(process, code_Z), code_Z.expand(9, -1), None, torch.randn(9, Z), torch.arange(0, 900, 100), None, process
    )
    assert loss_B.shape == (9,)
    assert float(loss_B.max()) < 1e-5


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_sampling_finds_the_code_that_the_oracle_knows(prediction_type: str, sampler: str, steps: int) -> None:
    process = diffusion(prediction_type=prediction_type, sampler=sampler)
    code_Z = torch.randn(Z)
    codes = sample_codes(Oracle(process, code_Z), None, range(4), 1.0, steps, diffusion=process)  # type: ignore[arg-type]
    torch.testing.assert_close(codes, code_Z.expand(4, -1), rtol=0, atol=0.02)


def test_the_noisy_code_at_the_end_is_noise_and_at_the_start_the_code() -> None:
    process = diffusion()
    codes, noise = torch.randn(2, Z), torch.randn(2, Z)
    noisy, _ = add_noise(codes, noise, torch.tensor([0, 999]), process)
    assert float((noisy[0] - codes[0]).abs().max()) < 0.05
    assert float((noisy[1] - noise[1]).abs().max()) < 0.05


def test_min_snr_weighs_a_v_prediction_by_its_signal_to_noise_ratio() -> None:
    process, plain = diffusion(min_snr_gamma=5.0), diffusion()
    arguments = (torch.randn(3, Z), None, torch.randn(3, Z), torch.tensor([0, 400, 990]), None)
    zero = lambda *_: torch.zeros(3, Z)  # noqa: E731
    weight_B = diffusion_loss(zero, *arguments, process) / diffusion_loss(zero, *arguments, plain)  # type: ignore[arg-type]
    snr = (process.schedule.signal / process.schedule.sigma).square()[arguments[3]]
    torch.testing.assert_close(weight_B, snr.clamp(max=5) / (snr + 1))


def network(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    config = DenoiserConfig(width=24, depth=2, condition_width=16, rank=2, generator_width=6)
    model = Denoiser(Z, C, config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def faces(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, C, generator=generator), dim=1)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_same_alone_and_in_any_batch(sampler: str, guidance: float) -> None:
    """To float error."""
    process, model, conditions = diffusion(sampler=sampler), network(), faces(5)
    seeds = [7, 3, 7, 11, 0]
    together = sample_codes(model, conditions, seeds, guidance, 10, diffusion=process)
    for i, seed in enumerate(seeds):
        alone = sample_codes(model, conditions[i : i + 1], [seed], guidance, 10, diffusion=process)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_same_call_gives_the_same_bits_and_another_seed_another_sample() -> None:
    process, model, conditions = diffusion(), network(), faces(3)
    first = sample_codes(model, conditions, [1, 2, 3], 2.0, 10, diffusion=process)
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(first, sample_codes(model, conditions, [1, 2, 3], 2.0, 10, diffusion=process))
    other = sample_codes(model, conditions, [1, 2, 4], 2.0, 10, diffusion=process)
    assert not torch.isclose(first[2], other[2]).all()


def test_guidance_1_is_the_conditional_and_0_the_unconditional_sample() -> None:
    process, model, conditions = diffusion(), network(), faces(2)
    conditional = sample_codes(model, conditions, [1, 2], 1.0, 8, diffusion=process)
    nobody = sample_codes(model, None, [1, 2], 1.0, 8, diffusion=process)
    barely = sample_codes(model, conditions, [1, 2], 1.0 + 1e-6, 8, diffusion=process)  # through both predictions
    torch.testing.assert_close(barely, conditional, rtol=1e-3, atol=1e-4)
    zero = sample_codes(model, conditions, [1, 2], 0.0, 8, diffusion=process)
    torch.testing.assert_close(zero, nobody, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(conditional, nobody).any(1).all()


def test_guidance_moves_on_along_the_line_from_nobody_to_somebody() -> None:
    """In one step of DDIM the sample is linear in the prediction."""
    process, model, conditions = diffusion(prediction_type="sample"), network(), faces(2)
    nobody, somebody, guided = (
        sample_codes(model, conditions, [1, 2], guidance, 1, diffusion=process) for guidance in (0.0, 1.0, 3.0)
    )
    torch.testing.assert_close(guided, nobody + 3 * (somebody - nobody), rtol=1e-4, atol=1e-5)


def test_the_corpus_prior_has_the_covariance_of_the_corpus() -> None:
    mixing = torch.randn(Z, Z, generator=torch.Generator().manual_seed(0))
    codes_PZ = torch.randn(500, Z) @ mixing
    process = Diffusion(DiffusionConfig(prior="corpus"), prior_factor(codes_PZ))
    noise = process.noise(torch.randn(50_000, Z, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(noise.T.cov(), codes_PZ.T.cov(correction=0), rtol=0.05, atol=0.2)
    code_Z = torch.randn(Z)
    codes = sample_codes(Oracle(process, code_Z), None, range(3), 1.0, 10, diffusion=process)  # type: ignore[arg-type]
    torch.testing.assert_close(codes, code_Z.expand(3, -1), rtol=0, atol=0.05)


def test_a_prior_and_its_factor_belong_together() -> None:
    with pytest.raises(ValueError, match="missing"):
        diffusion(prior="corpus")
    with pytest.raises(ValueError, match="no use"):
        Diffusion(DiffusionConfig(), torch.eye(3))
    with pytest.raises(ValueError, match="prior: gaussian"):
        prior_factor(torch.zeros(2, 5000))


def test_wrong_counts_are_refused() -> None:
    process, model = diffusion(), network()
    with pytest.raises(ValueError, match="one seed for each"):
        sample_codes(model, faces(2), [1], 1.0, 5, diffusion=process)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="num_inference_steps"):
            sample_codes(model, faces(1), [1], 1.0, steps, diffusion=process)
    assert sample_codes(model, None, [], 1.0, 5, diffusion=process).shape == (0, Z)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction_type", "conditioning"), [*((kind, "adalora") for kind in TYPES), ("v_prediction", "adanorm")]
)
def test_a_trained_denoiser_recovers_what_each_face_means(prediction_type: str, conditioning: str) -> None:
    """A mixture of four Gaussians, one for each face; without a face, the mean and spread of all."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    means_KZ = torch.randn(4, Z, generator=generator)
    means_KZ = means_KZ - means_KZ.mean(0)
    conditions_KC, spread = faces(4), 0.2
    process = diffusion(prediction_type=prediction_type, condition_dropout=0.1)
    config = DenoiserConfig(
        width=64,
        depth=2,
        condition_width=32,
        rank=2,
        generator_width=8,
        conditioning=conditioning,  # type: ignore[arg-type]
    )
    model = Denoiser(Z, C, config)
    steps = 500
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        who = torch.randint(0, 4, (256,), generator=generator)
        codes = means_KZ[who] + spread * torch.randn(256, Z, generator=generator)
        loss_B = diffusion_loss(
            model,
            codes,
            conditions_KC[who],
            torch.randn(256, Z, generator=generator),
            torch.randint(0, 1000, (256,), generator=generator),
            torch.rand(256, generator=generator) < 0.1,
            process,
        )
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
        schedule.step()
    model.eval()
    samples = sample_codes(
        model, conditions_KC.repeat_interleave(64, 0), list(range(64)) * 4, 1.0, 25, diffusion=process
    )
    samples_KSZ = samples.view(4, 64, Z)
    assert float((samples_KSZ.mean(1) - means_KZ).abs().max()) < 0.2
    assert float(samples_KSZ.std(1).mean()) < 2.5 * spread
    nobody = sample_codes(model, None, range(256), 1.0, 25, diffusion=process)
    assert float(nobody.mean(0).abs().max()) < 0.45
    torch.testing.assert_close(nobody.std(0), means_KZ.std(0, correction=0), rtol=0.4, atol=0.25)


class Gaussian(nn.Module):
    """The exact answer where a face's codes are N(its first numbers, 0.3²), and all codes N(0, 1)."""

    def __init__(self, process: Diffusion) -> None:
        super().__init__()
        self.process = process

    def forward(self, x_BZ: Tensor, t_B: Tensor, condition_BC: Tensor | None) -> Tensor:
        signal, sigma = (table[t_B][:, None] for table in (self.process.schedule.signal, self.process.schedule.sigma))
        mean, variance = (0.0, 1.0) if condition_BC is None else (condition_BC[:, : x_BZ.shape[1]], 0.09)
        gain = signal * variance / (signal**2 * variance + sigma**2)
        code = mean + gain * (x_BZ - signal * mean)
        noise = (x_BZ - signal * code) / sigma
        kind = self.process.config.prediction_type
        return {"epsilon": noise, "sample": code, "v_prediction": signal * noise - sigma * code}[kind]


def test_the_score_falls_with_the_distance_from_the_face_whatever_is_predicted() -> None:
    """Codes of one length, turned away from what the face means by 0 to 180 degrees."""
    size = 32
    directions = torch.linalg.qr(torch.randn(size, 2, generator=torch.Generator().manual_seed(0)))[0].T * size**0.5
    angles = torch.linspace(0, torch.pi, 7)[:, None]
    codes_BZ = angles.cos() * directions[0] + angles.sin() * directions[1]
    face_BC = directions[:1].expand(7, -1)
    scores = []
    for prediction_type in TYPES:
        process = diffusion(prediction_type=prediction_type)
        scores.append(score_codes(Gaussian(process), codes_BZ, face_BC, diffusion=process))  # type: ignore[arg-type]
        assert (scores[-1].diff() < 0).all()
        assert float(scores[-1][0]) > 0 > float(scores[-1][-1])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores[2], scores[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_sampling_begins_where_all_is_noise(sampler: str) -> None:
    """An oracle finds its code from anywhere; a network takes the noise that it is given for what the timestep says."""
    scheduler = Diffusion(DiffusionConfig(sampler=sampler)).sampler()  # type: ignore[arg-type]
    for steps, timesteps in ((1, [999]), (4, [999, 749, 499, 249])):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps


def test_the_schedule_is_the_one_that_was_asked_for() -> None:
    begin, end = 1e-3, 0.012
    for kind, betas in (
        ("linear", torch.linspace(begin, end, 50)),
        ("scaled_linear", torch.linspace(begin**0.5, end**0.5, 50) ** 2),
    ):
        config = DiffusionConfig(num_train_timesteps=50, beta_schedule=kind, beta_start=begin, beta_end=end)  # type: ignore[arg-type]
        torch.testing.assert_close(Diffusion(config).schedule.signal.square(), (1 - betas).cumprod(0))


def test_the_guess_knows_the_variance_of_the_priors_noise() -> None:
    """Of codes whose numbers hang together: the factor's rows, not its columns."""
    codes_PZ, mixing = (torch.randn(n, 6, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((500, 6)))
    codes_PZ = codes_PZ @ mixing
    process = Diffusion(DiffusionConfig(prior="corpus"), prior_factor(codes_PZ))
    config = DenoiserConfig(width=16, depth=1, condition_width=16, rank=1, generator_width=4, linear_guess=True)
    guess = process.denoiser(6, 12, config).guess
    assert guess is not None
    torch.testing.assert_close(guess.noise_Z, codes_PZ.var(0, correction=0))
