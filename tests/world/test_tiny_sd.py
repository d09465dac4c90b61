"""The shipped base model and the renderer: what a user may rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import ASSETS, BaseModel
from lora_diffusion.world.scenes import SceneClassifier, labels_of_prompt, prompt_accuracy

PROMPT = "a photo of sks person, neutral, facing the camera, soft daylight, {} background, wearing a red v-neck top"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pretrained("tiny-sd")


def test_it_fits_in_12_megabytes_and_no_path_of_the_trainer_is_left() -> None:
    files = [path for path in (ASSETS / "tiny-sd").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_diffusers_loads_and_runs_it_without_our_code() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny-sd", safety_checker=None)
    picture = pipe("a photo of sks person", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)


def test_a_person_is_drawn_the_same_alone_and_in_company(base: BaseModel) -> None:
    layout = LoRALayout.from_unet(base.unet, rank=1)
    bank = LoRABank(base.unet, layout)
    vectors_KN = 0.3 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT.format("beach"), PROMPT.format("forest")]
    together = render(base, vectors_KN, prompts * 3, [1, 2] * 3, bank=bank, num_inference_steps=3)
    alone = render(base, vectors_KN[1:2], prompts, [1, 2], bank=bank, num_inference_steps=3)
    assert np.abs(together[2:4].astype(int) - alone).max() <= 1  # float error may round a grey level
    assert np.abs(together[0:2].astype(int) - alone).max() > 20  # and people differ
    small_groups = render(base, vectors_KN, prompts * 3, [1, 2] * 3, bank=bank, num_inference_steps=3, max_batch=2)
    assert np.abs(small_groups.astype(int) - together).max() <= 1


def test_pictures_that_cannot_be_shared_evenly_are_refused(base: BaseModel) -> None:
    layout = LoRALayout.from_unet(base.unet, rank=1)
    with pytest.raises(ValueError, match="shared evenly"):
        render(base, torch.zeros(2, layout.size), [PROMPT] * 3, [0, 1, 2], bank=LoRABank(base.unet, layout))
    with pytest.raises(ValueError, match="one seed for each picture"):
        render(base, None, [PROMPT] * 2, [0])


def test_it_obeys_the_background_of_a_prompt(base: BaseModel) -> None:
    prompts = [PROMPT.format(place) for place in ("beach", "forest", "dark studio", "blue wall") for _ in range(4)]
    pictures = render(base, None, prompts, list(range(16)), num_inference_steps=12, guidance_scale=2.0)
    accuracy = prompt_accuracy(SceneClassifier.from_pretrained(), pictures, prompts)
    assert accuracy["background"] >= 0.9  # measured: 1.00 (its card)


def test_a_prompt_is_read_into_the_labels_of_the_scene_classifier() -> None:
    labels = labels_of_prompt("a photo of sks person, smiling, turned slightly left, wearing a light blue shirt")
    assert set(labels) == {"expression", "pose", "cloth"}
    with_words = labels_of_prompt("a photo of a man with short hair, flash, night lights background")
    assert set(with_words) == {"light", "background"}


def test_the_vae_keeps_pictures(base: BaseModel) -> None:
    from lora_diffusion.world.people import render as photograph
    from lora_diffusion.world.people import sample_person, sample_view

    photos = np.stack([photograph(sample_person(n), sample_view(n, 0)).image for n in range(80_000, 80_006)])
    again = base.decode(base.encode_images(photos))
    assert np.abs(again.astype(int) - photos).mean() < 9  # measured: 6.2 of 255
