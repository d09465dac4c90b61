"""K people together must come out as each alone, and as a plain loop of peft and torch.optim.AdamW."""

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from lora_diffusion.base import BaseModel
from lora_diffusion.lora.finetune import Finetuner, FinetuneConfig, PersonPhotos, initial_vectors
from lora_diffusion.lora.layout import LoRALayout

# After 20 AdamW steps in float32, relative to how far training moved the vector. Measured: 1e-6 to 7e-6.
TOLERANCE = 1e-4
PLAIN = FinetuneConfig(steps=20, batch_size=2, instance_prompt="sks person", class_prompt="person", channels_last=False)


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
    return PersonPhotos(name, pixels, captions_P)


PEOPLE = [person("ada", 1), person("bob", 5), person("cyd", 3, captions=True)]
CLASS_PIXELS = person("others", 4).pixels


def finetune(
    base: BaseModel, layout: LoRALayout, config: FinetuneConfig, people: list[PersonPhotos], **kwargs: Any
) -> Any:
    return Finetuner(base, layout, config, **kwargs)(people)


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

    for step in range(config.steps):
        samples = []
        for i in range(config.batch_size):
            index = (step * config.batch_size + i) % len(person.pixels)
            caption = person.captions[index] if person.captions else config.instance_prompt
            samples.append(encode(person.pixels[index], caption))
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
        loss = torch.nn.functional.mse_loss(prediction[:n], target[:n])
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
    ("rank", "prediction_type", "prior", "train_A"),
    [(1, "epsilon", False, True), (4, "v_prediction", True, True), (1, "sample", True, False)],
)
def test_K_people_together_equal_a_plain_peft_loop_for_each(
    base: BaseModel, rank: int, prediction_type: str, prior: bool, train_A: bool
) -> None:
    base = with_prediction(base, prediction_type)
    layout = LoRALayout.from_unet(base.unet, rank=rank, alpha=2)
    config = dataclasses.replace(PLAIN, train_A=train_A, prior_weight=0.7, max_grad_norm=0.05)
    class_pixels = CLASS_PIXELS if prior else None
    result = finetune(base, layout, config, PEOPLE, class_pixels=class_pixels)
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
