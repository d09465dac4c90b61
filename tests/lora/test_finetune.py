"""K people together must come out as each alone, and as a plain loop of peft and torch.optim.AdamW."""

import copy
import dataclasses
import functools
import math

import numpy as np
import peft
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_pipeline import tiny_pipeline
from tiny_unet import SMALLEST, tiny_unet
from torch import Tensor

from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import RandomStreams
from lora_diffusion.lora.photo_data import PersonPhotos, face_weights
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel

# After 20 AdamW steps in float32, relative to how far training moved the vector. Measured: 1e-6 to 7e-6.
TOLERANCE = 1e-4
PLAIN = FinetuneConfig(steps=20, batch_size=2, instance_prompt="sks person", class_prompt="person")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(tiny_pipeline())


@pytest.fixture(scope="module")
def layout(base: BaseModel) -> LoRALayout:
    return LoRALayout.from_unet(base.unet)


def person(name: str, photos: int, captions: bool = False) -> PersonPhotos:
    """Coarse random pictures, the same for the same name."""
    rng = np.random.default_rng(list(name.encode()))
    pixels = rng.integers(0, 256, (photos, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    captions_P = tuple("sks " + i * "z" for i in range(photos)) if captions else None
    corner_P2 = rng.uniform(0, 6, (photos, 2))
    boxes_P4 = np.concatenate([corner_P2, corner_P2 + rng.uniform(4, 10, (photos, 2))], axis=1).astype(np.float32)
    return PersonPhotos(name, pixels, captions_P, boxes_P4)


PEOPLE = [person("ada", 1), person("bob", 5), person("cyd", 3, captions=True)]
CLASS_PIXELS = person("others", 4).pixels


def with_prediction(base: BaseModel, prediction_type: str) -> BaseModel:
    return dataclasses.replace(base, scheduler=DDPMScheduler(prediction_type=prediction_type))


def distance(a_N: np.ndarray, b_N: np.ndarray, start_N: np.ndarray) -> float:
    """How far two LoRAs are apart, in units of how far training moved them."""
    return float(np.linalg.norm(a_N - b_N) / np.linalg.norm(b_N - start_N))


def plain_peft_loop(
    base: BaseModel, layout: LoRALayout, config: FinetuneConfig, person: PersonPhotos, class_pixels: np.ndarray | None
) -> np.ndarray:
    """The independent reference: one person, nothing cached, nothing batched over people, only public libraries."""
    lora = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=list(layout.target_modules))
    unet = peft.inject_adapter_in_model(lora, copy.deepcopy(base.unet))
    for name, (A_KRI, _) in layout.split(initial_vectors(layout, config.seed)).items():
        unet.get_submodule(name).lora_A["default"].weight.data = A_KRI[0].clone()
    named = [(name, p) for name, p in unet.named_parameters() if "lora_" in name]
    for name, parameter in named:
        parameter.requires_grad_(config.train_A or "lora_B" in name)
    learned = [parameter for _, parameter in named if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)

    def encode(pixels: np.ndarray, prompt: str) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2) / 127.5 - 1
        tokens = base.tokenizer(
            prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        ).input_ids
        latent = base.vae.encode(image).latent_dist.mean * base.vae.config.scaling_factor
        return latent, base.text_encoder(tokens).last_hidden_state

    def importance(box: np.ndarray, size: int) -> Tensor:
        """How much each of size × size cells counts: `face_weight` near the face, 1 elsewhere, in the mean 1."""
        pixel = (np.arange(size) + 0.5) * person.pixels.shape[1] / size
        across = (pixel - (box[0] + box[2]) / 2) / (box[2] - box[0]) * 2
        down = (pixel - (box[1] + box[3]) / 2) / (box[3] - box[1]) * 2
        inside = 1 / (1 + np.exp(6 * (np.sqrt(down[:, None] ** 2 + across**2) - 1.3)))
        weights = config.face_weight * inside + 1 - inside
        return torch.tensor(weights / weights.mean(), dtype=torch.float32)

    for step in range(config.steps):
        samples, weights = [], []
        for i in range(config.batch_size):
            index = (step * config.batch_size + i) % len(person.pixels)
            caption = person.captions[index] if person.captions else config.instance_prompt
            samples.append(encode(person.pixels[index], caption))
            weights.append(importance(person.face_boxes[index], samples[0][0].shape[-1]))
        if class_pixels is not None:
            for i in range(config.prior_batch_size):
                index = (step * config.prior_batch_size + i) % len(class_pixels)
                samples.append(encode(class_pixels[index], config.class_prompt))
        x0, text = (torch.cat(parts) for parts in zip(*samples, strict=True))
        timesteps = (torch.rand(len(x0), generator=generator, dtype=torch.float64) * 1000).long()
        noise = torch.randn(x0.shape, generator=generator)
        prediction = unet(base.scheduler.add_noise(x0, noise, timesteps), timesteps, text).sample
        target = {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": base.scheduler.get_velocity(x0, noise, timesteps),
        }[base.scheduler.config.prediction_type]
        n = config.batch_size
        loss = (torch.stack(weights)[:, None] * (prediction[:n] - target[:n]) ** 2).mean()
        if class_pixels is not None:
            loss = loss + config.prior_weight * torch.nn.functional.mse_loss(prediction[n:], target[n:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
    matrices = {
        entry.name: (
            unet.get_submodule(entry.name).lora_A["default"].weight.detach()[None],
            unet.get_submodule(entry.name).lora_B["default"].weight.detach()[None],
        )
        for entry in layout.entries
    }
    return layout.join(matrices)[0].numpy()


@pytest.mark.parametrize(
    ("rank", "prediction_type", "prior", "train_A", "face_weight"),
    [(1, "epsilon", False, True, 1.0), (4, "v_prediction", True, True, 1.0), (1, "sample", True, False, 5.0)],
)
def test_K_people_together_equal_a_plain_peft_loop_for_each(
    base: BaseModel, rank: int, prediction_type: str, prior: bool, train_A: bool, face_weight: float
) -> None:
    base = with_prediction(base, prediction_type)
    layout = LoRALayout.from_unet(base.unet, rank=rank, alpha=2)
    config = dataclasses.replace(PLAIN, train_A=train_A, prior_weight=0.7, max_grad_norm=0.05, face_weight=face_weight)
    class_pixels = CLASS_PIXELS if prior else None
    result = Finetuner(base, layout, config, class_pixels)(PEOPLE)
    start_N = initial_vectors(layout, config.seed)[0].numpy()
    for k, someone in enumerate(PEOPLE):
        reference_N = plain_peft_loop(base, layout, config, someone, class_pixels)
        assert distance(result.vectors_KN[k], reference_N, start_N) < TOLERANCE
    assert distance(result.vectors_KN[0], result.vectors_KN[1], start_N) > 100 * TOLERANCE  # people do differ


@pytest.mark.parametrize("common", [True, False])
def test_a_person_comes_out_the_same_in_any_company(base: BaseModel, layout: LoRALayout, common: bool) -> None:
    finetuner = Finetuner(base, layout, dataclasses.replace(PLAIN, common_random_numbers=common))
    together = finetuner(PEOPLE).vectors_KN
    for order in ([1], [2, 0]):
        again = finetuner([PEOPLE[k] for k in order]).vectors_KN
        for row, k in enumerate(order):
            assert distance(again[row], together[k], np.zeros(layout.size)) < TOLERANCE


QUICK = dataclasses.replace(PLAIN, steps=3, learning_rate=1e-3)


def test_same_call_gives_the_same_bits(base: BaseModel, layout: LoRALayout) -> None:
    finetuner = Finetuner(base, layout, QUICK, CLASS_PIXELS)
    first, second = finetuner(PEOPLE), finetuner(PEOPLE)
    assert np.array_equal(first.vectors_KN, second.vectors_KN)
    assert np.array_equal(first.loss_history_SK, second.loss_history_SK)
    assert np.array_equal(first.vectors_KN, Finetuner(base, layout, QUICK, CLASS_PIXELS)(PEOPLE).vectors_KN)


def test_result_says_what_it_is(base: BaseModel, layout: LoRALayout) -> None:
    result = Finetuner(base, layout, QUICK)(PEOPLE)
    assert result.identities == ("ada", "bob", "cyd")
    assert (result.vectors_KN.shape, result.vectors_KN.dtype) == ((3, layout.size), np.float32)
    assert (result.steps, result.layout_id) == (3, layout.layout_id)
    assert result.loss_history_SK.shape == (3, 3)
    assert np.array_equal(result.loss_K, result.loss_history_SK[-1])
    assert not result.diverged_K.any()
    assert result.seconds > 0


def test_base_model_is_left_as_it_was(base: BaseModel, layout: LoRALayout) -> None:
    fingerprint = base.fingerprint
    Finetuner(base, layout, QUICK)(PEOPLE)
    assert BaseModel.from_pipeline(tiny_pipeline()).fingerprint == fingerprint == dataclasses.replace(base).fingerprint
    assert all(parameter.grad is None for parameter in base.unet.parameters())


def test_fine_tuning_learns_the_person(base: BaseModel, layout: LoRALayout) -> None:
    """On its own noise, the loss of the person trained on falls by more than that of a stranger."""
    config = dataclasses.replace(PLAIN, steps=60, learning_rate=2e-2, batch_size=4, timestep_range=(200, 800))
    base = with_prediction(base, "sample")
    ada, eve = person("ada", 1), person("eve", 1)
    trained = Finetuner(base, layout, config)([ada]).vectors_KN
    evaluate = Finetuner(base, layout, dataclasses.replace(config, steps=1, seed=1))
    before = evaluate([ada, eve]).loss_K
    after = evaluate([ada, eve], np.repeat(trained, 2, 0)).loss_K
    assert after[0] < 0.8 * before[0]
    assert after[0] / before[0] < after[1] / before[1]


def test_A_starts_as_peft_starts_it_and_B_at_zero(layout: LoRALayout) -> None:
    vectors_KN = initial_vectors(layout, seed=0, K=2)
    assert torch.equal(vectors_KN[0], vectors_KN[1])
    assert not torch.equal(vectors_KN, initial_vectors(layout, seed=1, K=2))
    for entry in layout.entries:
        A_KRI, B_KOR = layout.split(vectors_KN)[entry.name]
        bound = 1 / math.sqrt(entry.in_features)
        assert 0.8 * bound < A_KRI.abs().max() <= bound
        assert A_KRI.std() == pytest.approx(bound / math.sqrt(3), rel=0.35)
        assert not B_KOR.any()


def test_frozen_A_is_shared_and_stays(base: BaseModel, layout: LoRALayout) -> None:
    start_N = initial_vectors(layout, QUICK.seed)[0].numpy()
    vectors_KN = Finetuner(base, layout, dataclasses.replace(QUICK, train_A=False))(PEOPLE).vectors_KN
    is_B = layout.mask_B().numpy()
    assert (vectors_KN[:, ~is_B] == start_N[~is_B]).all()
    assert (vectors_KN[:, is_B] != 0).mean() > 0.9


def test_common_random_numbers_give_the_same_LoRA_for_the_same_photos(base: BaseModel, layout: LoRALayout) -> None:
    twins = [PersonPhotos(name, PEOPLE[1].pixels) for name in ("one", "two")]
    common = Finetuner(base, layout, QUICK)(twins).vectors_KN
    assert distance(common[0], common[1], np.zeros(layout.size)) < TOLERANCE
    own = Finetuner(base, layout, dataclasses.replace(QUICK, common_random_numbers=False))(twins).vectors_KN
    assert distance(own[0], own[1], np.zeros(layout.size)) > 0.5


def test_diverged_person_touches_nobody(base: BaseModel, layout: LoRALayout) -> None:
    finetuner = Finetuner(base, layout, QUICK)
    start_KN = initial_vectors(layout, QUICK.seed, K=3)
    healthy = finetuner(PEOPLE, start_KN)
    for bad in (math.nan, math.inf, 1e38):  # the last one is finite, but its forward is not
        start_KN[1] = bad
        result = finetuner(PEOPLE, start_KN)
        assert result.diverged_K.tolist() == [False, True, False]
        assert not result.vectors_KN[1].any()
        assert np.array_equal(result.vectors_KN[[0, 2]], healthy.vectors_KN[[0, 2]])
        assert np.array_equal(result.loss_K[[0, 2]], healthy.loss_K[[0, 2]])


def test_divergence_on_the_way_is_noticed(base: BaseModel, layout: LoRALayout) -> None:
    result = Finetuner(base, layout, dataclasses.replace(QUICK, learning_rate=1e30))(PEOPLE)
    assert result.diverged_K.all()
    assert not result.vectors_KN.any()


def test_average_last_is_the_mean_of_the_last_iterates(base: BaseModel, layout: LoRALayout) -> None:
    constant = dataclasses.replace(QUICK, lr_schedule="constant")
    iterates = [Finetuner(base, layout, dataclasses.replace(constant, steps=n))(PEOPLE).vectors_KN for n in (2, 3)]
    averaged = Finetuner(base, layout, dataclasses.replace(constant, average_last=2))(PEOPLE).vectors_KN
    assert np.abs(averaged - np.mean(iterates, 0)).max() < 1e-6
    assert np.abs(averaged - iterates[1]).max() > 1e-5


def test_update_scale_goes_further_from_the_start(base: BaseModel, layout: LoRALayout) -> None:
    start_1N = 0.1 * torch.randn(1, layout.size, generator=torch.Generator().manual_seed(0))
    for config in (QUICK, dataclasses.replace(QUICK, train_A=False)):
        once = Finetuner(base, layout, config)(PEOPLE, start_1N).vectors_KN - start_1N.numpy()
        twice = Finetuner(base, layout, dataclasses.replace(config, update_scale=2.0))(PEOPLE, start_1N).vectors_KN
        assert np.abs(twice - start_1N.numpy() - 2 * once).max() < 1e-6
        assert np.abs(once).max() > 1e-3


def test_start_vectors_are_where_training_starts(base: BaseModel, layout: LoRALayout) -> None:
    start_1N = 0.1 * torch.randn(1, layout.size, generator=torch.Generator().manual_seed(0))
    no_steps = Finetuner(base, layout, dataclasses.replace(QUICK, steps=0))(PEOPLE, start_1N)
    assert (no_steps.vectors_KN == start_1N.numpy()).all()
    assert np.isnan(no_steps.loss_K).all()
    assert not no_steps.diverged_K.any()
    finetuner = Finetuner(base, layout, QUICK)
    one_for_all, one_for_each = finetuner(PEOPLE, start_1N), finetuner(PEOPLE, start_1N.repeat(3, 1).numpy())
    assert np.array_equal(one_for_all.vectors_KN, one_for_each.vectors_KN)
    assert 0 < np.abs(one_for_all.vectors_KN - start_1N.numpy()).max() < 0.01


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = FinetuneConfig(steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [config.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert dataclasses.replace(config, lr_schedule="constant").rate(99) == 1


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"channels_last": True}, TOLERANCE),
        ({"gradient_checkpointing": True}, TOLERANCE),
        ({"autocast": "bfloat16"}, 0.3),
    ],
)
def test_speed_and_memory_options_change_no_result(
    layout: LoRALayout, changes: dict[str, object], tolerance: float
) -> None:
    reference, other = (BaseModel.from_pipeline(tiny_pipeline()) for _ in range(2))
    start_N = initial_vectors(layout, QUICK.seed)[0].numpy()
    expected = Finetuner(reference, layout, QUICK)(PEOPLE).vectors_KN
    found = Finetuner(other, layout, dataclasses.replace(QUICK, **changes))(PEOPLE).vectors_KN
    for k in range(3):
        assert distance(found[k], expected[k], start_N) < tolerance
    assert other.unet.is_gradient_checkpointing == ("gradient_checkpointing" in changes)
    if "gradient_checkpointing" not in changes:  # which repeats the same sums; the others must differ in some bits
        assert not np.array_equal(found, expected)


def test_bfloat16_base_trains_float32_vectors(layout: LoRALayout) -> None:
    base = BaseModel.from_pipeline(tiny_pipeline().to(torch.bfloat16))
    result = Finetuner(base, layout, QUICK)(PEOPLE)
    assert not result.diverged_K.any()
    assert result.vectors_KN.dtype == np.float32
    rounded = torch.from_numpy(result.vectors_KN).bfloat16().float().numpy()
    assert (rounded != result.vectors_KN).mean() > 0.9  # the optimiser kept more digits than the base has


@pytest.mark.slow
def test_compiled_fine_tuning_equals_eager(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    base = dataclasses.replace(base, unet=tiny_unet(config=SMALLEST))
    layout = LoRALayout.from_unet(base.unet)
    expected = Finetuner(base, layout, QUICK)(PEOPLE).vectors_KN
    # The graph is captured and differentiated as for the GPU, but not turned into C++, which takes a minute here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    found = Finetuner(base, layout, dataclasses.replace(QUICK, compile=True))(PEOPLE).vectors_KN
    torch._dynamo.reset()
    assert distance(found, expected, np.zeros(layout.size)) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1"),
        ({"update_scale": 0.0}, "update_scale is 0"),
        ({"average_last": 4}, "more than the 3 steps"),
        ({"train_A": False, "common_random_numbers": False}, "gives each its own"),
    ],
)
def test_senseless_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **changes)


def test_a_photo_without_a_face_counts_everywhere_alike() -> None:
    boxes_P4 = np.array([[8, 8, 24, 40], [np.nan] * 4], np.float32)
    weights_PHW = face_weights(boxes_P4, picture=(64, 32), cells=(16, 8), weight=10)
    assert torch.equal(weights_PHW[1], torch.ones(16, 8))
    assert torch.allclose(weights_PHW.mean((1, 2)), torch.ones(2))
    assert weights_PHW[0].argmax() // 8 in (5, 6), "the middle of the face is at 24 of 64 px"
    assert weights_PHW[0, 6, 4] / weights_PHW[0, -1, 0] == pytest.approx(10, rel=0.01)


def test_faces_that_count_more_must_be_known(base: BaseModel, layout: LoRALayout) -> None:
    config = dataclasses.replace(QUICK, face_weight=3.0)
    with pytest.raises(ValueError, match=r"eve: face_weight is 3\.0, but no face_boxes"):
        Finetuner(base, layout, config)([PersonPhotos("eve", PEOPLE[0].pixels)])
    with pytest.raises(ValueError, match=r"face_boxes are \(2, 4\); expected \(1, 4\)"):
        PersonPhotos("eve", PEOPLE[0].pixels, face_boxes=np.zeros((2, 4), np.float32))


def test_senseless_input_is_refused(base: BaseModel, layout: LoRALayout) -> None:
    finetuner = Finetuner(base, layout, QUICK)
    with pytest.raises(ValueError, match="nobody"):
        finetuner([])
    with pytest.raises(ValueError, match="2 start vectors for 3 people"):
        finetuner(PEOPLE, np.zeros((2, layout.size), np.float32))
    with pytest.raises(ValueError, match="expects"):
        finetuner(PEOPLE, np.zeros((3, 7), np.float32))
    large = PersonPhotos("large", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"sizes \[\(16, 16\), \(32, 32\)\]"):
        finetuner([PEOPLE[0], large])
    with pytest.raises(ValueError, match="eve: photos are float32"):
        PersonPhotos("eve", np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="at least one photo"):
        PersonPhotos("eve", np.zeros((0, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="1 captions for 2 photos"):
        PersonPhotos("eve", np.zeros((2, 16, 16, 3), np.uint8), ("one",))
    with pytest.raises(ValueError, match="timestep_range"):
        Finetuner(base, layout, dataclasses.replace(QUICK, timestep_range=(0, 1001)))
    with pytest.raises(ValueError, match="float16"):
        Finetuner(BaseModel.from_pipeline(tiny_pipeline().to(torch.float16)), layout, QUICK)


def test_min_snr_weighs_each_persons_sample_by_its_own_timestep(base: BaseModel, layout: LoRALayout) -> None:
    plain = dataclasses.replace(QUICK, steps=1, batch_size=1, common_random_numbers=False)
    finetuner = Finetuner(base, layout, dataclasses.replace(plain, min_snr_gamma=1.0))
    streams = RandomStreams([one.identity for one in PEOPLE], plain.seed, False)
    shape = tuple(base.encode_images(PEOPLE[0].pixels).shape[1:])
    timesteps_Kn, _ = streams.draw(shape, [1], finetuner.sample_timesteps)
    weights_K = finetuner.schedule.min_snr_weights(timesteps_Kn, 1.0)[:, 0].numpy()
    assert weights_K.min() < 0.5 < weights_K.max()
    ratio_K = finetuner(PEOPLE).loss_K / Finetuner(base, layout, plain)(PEOPLE).loss_K
    np.testing.assert_allclose(ratio_K, weights_K, rtol=1e-4)
