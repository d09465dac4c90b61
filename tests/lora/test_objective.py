"""Noise, targets, weights and random numbers of a fine-tuning step, against diffusers and against their formulas."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_diffusion.lora.objective import NoiseSchedule, RandomStreams, TimestepSampler, identity_seed

CPU = torch.device("cpu")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_question_is_that_of_diffusers(prediction_type: str) -> None:
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    x0, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    x_t, target = NoiseSchedule.from_scheduler(scheduler, CPU).add_noise(x0, noise, timesteps)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, timesteps)}
    assert torch.allclose(x_t, scheduler.add_noise(x0, noise, timesteps), atol=1e-6)
    assert torch.allclose(target, expected[prediction_type], atol=1e-6)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    timesteps = torch.tensor([0, 100, 500, 900])
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        alphas_cumprod = scheduler.alphas_cumprod[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        x0_weight = torch.minimum(snr, torch.full_like(snr, 5.0))  # of the loss on x0, section 3.4
        expected = {"sample": x0_weight, "epsilon": x0_weight / snr, "v_prediction": x0_weight / (snr + 1)}
        found = NoiseSchedule.from_scheduler(scheduler, CPU).min_snr_weights(timesteps, gamma=5.0)
        assert torch.allclose(found, expected[prediction_type], rtol=1e-3)


def test_min_snr_weights_are_finite_where_no_signal_is_left() -> None:
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        weights = NoiseSchedule.from_scheduler(scheduler, CPU).min_snr_weights(torch.arange(1000), gamma=5.0)
        assert torch.isfinite(weights).all()


def test_scheduler_without_a_noise_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(), CPU)


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_timesteps_cover_their_range_evenly(kind: str) -> None:
    sample, generator = TimestepSampler(200, 800, kind), torch.Generator().manual_seed(0)
    draws = torch.stack([sample(4, generator) for _ in range(3000)])
    assert (draws.min(), draws.max()) == (200, 799)
    for place in range(4):
        assert draws[:, place].double().mean() == pytest.approx(499.5, abs=12)
    gaps = draws.sort(1).values.diff(dim=1)
    assert (gaps.min() >= 149 and gaps.max() <= 151) if kind == "stratified" else gaps.min() == 0


def test_common_streams_are_equal_for_all_and_independent_of_company() -> None:
    sample = TimestepSampler(0, 1000, "uniform")
    timesteps, noise = RandomStreams(["a", "b"], 0, common=True).draw((4, 2, 2), [3, 1], sample)
    assert timesteps.shape == (2, 4)
    assert noise.shape == (2, 4, 4, 2, 2)
    assert torch.equal(timesteps[0], timesteps[1])
    assert torch.equal(noise[0], noise[1])
    alone = RandomStreams(["z"], 0, common=True).draw((4, 2, 2), [3, 1], sample)
    assert torch.equal(alone[1][0], noise[0])
    assert not torch.equal(RandomStreams(["z"], 1, common=True).draw((4, 2, 2), [3, 1], sample)[1][0], noise[0])


def test_own_streams_hang_on_seed_and_name_alone() -> None:
    sample = TimestepSampler(0, 1000, "uniform")
    _, noise = RandomStreams(["a", "b"], 0, common=False).draw((4, 2, 2), [2], sample)
    assert not torch.equal(noise[0], noise[1])
    _, alone = RandomStreams(["b"], 0, common=False).draw((4, 2, 2), [2], sample)
    assert torch.equal(alone[0], noise[1])
    assert identity_seed(0, "a") == 5690829181965289459  # the same on every machine and in every process
