"""configs/sd15.yaml without SD 1.5's weights: its layout on the meta device, its step on a narrow twin of random weights."""

import copy
import dataclasses
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from narrow_sd15 import save_narrow_sd15

from lora_diffusion.config import load_config, to_dict
from lora_diffusion.faces.embedder import FaceEmbedder
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import BaseModel

SD15 = Path(__file__).resolve().parents[2] / "configs" / "sd15.yaml"
CONFIG = load_config(CorpusConfig, SD15)


@pytest.fixture(scope="module")
def narrow_sd15(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_narrow_sd15(tmp_path_factory.mktemp("narrow-sd15"))


def layout_of(unet: torch.nn.Module) -> LoRALayout:
    lora = CONFIG.lora
    return LoRALayout.from_unet(unet, lora.rank, lora.target_modules, lora.alpha)


def people(count: int) -> list[PersonPhotos]:
    rng = np.random.default_rng(0)
    return [PersonPhotos(f"p{i}", rng.integers(0, 256, (3, 64, 64, 3), np.uint8)) for i in range(count)]


CLASS_PIXELS = people(1)[0].pixels[::-1].copy()
ONE_STEP = dataclasses.replace(CONFIG.finetune, steps=1)


def test_the_recipe_is_that_of_weights2weights() -> None:
    """arXiv:2406.09413; every key of the file is a key of CorpusConfig, or load_config had raised."""
    recipe = {
        "steps": 800,
        "batch_size": 1,
        "prior_batch_size": 1,
        "prior_weight": 1.0,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "train_A": True,
        "average_last": 0,
        "update_scale": 1.0,
        "common_random_numbers": True,
        "instance_prompt": "sks person",
        "class_prompt": "person",
        "timesteps": "uniform",
        "timestep_range": None,
        "min_snr_gamma": None,
    }
    assert recipe.items() <= to_dict(CONFIG.finetune).items()
    assert CONFIG.class_images == 200
    assert (CONFIG.lora.rank, CONFIG.lora.alpha, CONFIG.lora.target_modules) == (1, 27, ("to_q", "to_v"))


def test_its_vector_is_99648_long_and_the_narrow_twin_has_the_same_modules_in_the_same_order(narrow_sd15: str) -> None:
    with torch.device("meta"):
        full = layout_of(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    assert full.size == 99_648
    narrow = layout_of(BaseModel.from_pretrained(narrow_sd15).unet)
    assert [entry.name for entry in narrow.entries] == [entry.name for entry in full.entries]
    assert narrow.layout_id != full.layout_id


def test_a_step_of_the_recipe_is_a_step_of_peft_and_adamw(narrow_sd15: str) -> None:
    base = BaseModel.from_pretrained(narrow_sd15)
    layout = layout_of(base.unet)
    someone, other = people(2)
    result = Finetuner(base, layout, ONE_STEP, CLASS_PIXELS)([other, someone])

    unet = copy.deepcopy(base.unet)
    unet.add_adapter(peft.LoraConfig(r=1, lora_alpha=27, target_modules=["to_q", "to_v"]))
    for name, (A_KRI, _) in layout.split(initial_vectors(layout, ONE_STEP.seed)).items():
        unet.get_submodule(name).lora_A["default"].weight.data = A_KRI[0].clone()
    learned = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(ONE_STEP.seed)
    t = torch.cat([(torch.rand(1, generator=generator, dtype=torch.float64) * 1000).long() for _ in range(2)])
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    x0 = base.encode_images(np.stack([someone.pixels[0], CLASS_PIXELS[0]]))
    text = base.encode_prompts(["sks person", "person"])
    prediction = unet(base.scheduler.add_noise(x0, noise, t), t, text).sample
    photo_loss, prior_loss = ((prediction - noise) ** 2).mean((1, 2, 3))
    (photo_loss + prior_loss).backward()
    torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
    optimizer.step()
    # weights2weights: peft's keys in lexicographic order, flattened, one after the other.
    expected_N, gradient_N = (
        torch.cat([tensors[name].detach().flatten() for name in sorted(learned)]).numpy()
        for tensors in (learned, {name: p.grad for name, p in learned.items()})
    )
    # AdamW's first step is the gradient's sign. Where the gradient is mere rounding, so is its sign.
    (told_N,) = (np.abs(gradient_N) > 1e-6).nonzero()
    assert len(told_N) > 0.9 * int(layout.mask_B().sum())  # all of B but the middle block's queries of one pixel
    got_N, start_N = result.vectors_KN[1], initial_vectors(layout, ONE_STEP.seed)[0].numpy()
    rate = ONE_STEP.learning_rate
    assert np.abs(expected_N - start_N)[told_N].min() > 0.9 * rate
    assert np.abs(got_N - expected_N)[told_N].max() < 0.01 * rate
    assert np.abs(got_N - expected_N).max() <= 2 * rate
    assert result.loss_K[1] == pytest.approx(photo_loss.item(), rel=1e-4)


def test_the_step_and_a_render_run_in_the_precision_of_the_configuration(narrow_sd15: str) -> None:
    base = BaseModel.from_pretrained(narrow_sd15, dtype=getattr(torch, CONFIG.dtype))
    assert base.dtype == torch.bfloat16
    layout = layout_of(base.unet)
    finetuner = Finetuner(base, layout, ONE_STEP, CLASS_PIXELS)
    result = finetuner(people(CONFIG.people_per_group))
    assert result.vectors_KN.shape == (CONFIG.people_per_group, layout.size)
    assert result.vectors_KN.dtype == np.float32
    assert not result.diverged_K.any()
    # B starts at zero, so A has no gradient in the first step; AdamW's first step is the learning rate, with a sign.
    is_B = layout.mask_B().numpy()
    start_N = initial_vectors(layout, ONE_STEP.seed)[0].numpy()
    np.testing.assert_allclose(result.vectors_KN[:, ~is_B], (start_N * (1 - 1e-4 * 1e-2))[None, ~is_B].repeat(8, 0))
    size_B = np.abs(result.vectors_KN[:, is_B])
    assert size_B.max() <= 1e-4 * 1.001
    assert np.median(size_B) > 0.9e-4
    vectors = result.vectors_KN.astype(CONFIG.vector_dtype)[:2]
    pictures = render(base, vectors, ["sks person"] * 2, [0, 0], bank=finetuner.bank, num_inference_steps=2)
    assert pictures.shape == (2, 64, 64, 3)


def test_a_hub_id_that_cannot_be_reached_is_an_error_that_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"(?s)cannot load a base model from 'stable-diffusion-v1-5.*hub id that this machine"
    ):
        BaseModel.from_pretrained(CONFIG.base)


def test_a_recogniser_that_is_not_there_is_an_error_that_says_where_it_belongs(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG.embedder, root=str(tmp_path), allow_download=False)
    with pytest.raises(ValueError, match=rf"'buffalo_l' is not in {tmp_path}/models/buffalo_l.*allow_download"):
        FaceEmbedder(config)
