"""The learned start must be the base model, be the same for the same people, and make fine-tuning learn faster."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.lora import formats
from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.lora.shared_start import StartConfig, learn_start, load_start
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.world.people.dataset import FacesConfig, FacesWriter

ROOT = Path(__file__).resolve().parents[2]
QUICK = StartConfig(steps=6, people_per_step=2, photos_per_person=2, warmup_steps=2)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(tiny_pipeline())


@pytest.fixture(scope="module")
def layout(base: BaseModel) -> LoRALayout:
    return LoRALayout.from_unet(base.unet, rank=2, target_modules=("to_v", "conv1"))


def people(count: int, photos: int = 3) -> list[PersonPhotos]:
    rng = np.random.default_rng(0)
    return [
        PersonPhotos(f"person-{k}", rng.integers(0, 256, (photos, 32, 32, 3), np.uint8), ("a photo",) * photos)
        for k in range(count)
    ]


def test_start_is_the_base_model_with_a_learned_A(base: BaseModel, layout: LoRALayout) -> None:
    losses: list[float] = []
    start_N = learn_start(base, layout, people(4), QUICK, report=lambda step, loss: losses.append(loss))
    is_B, random_N = layout.mask_B(), initial_vectors(layout, QUICK.seed)[0]
    assert not start_N[is_B].any()
    assert (start_N[~is_B] != random_N[~is_B]).float().mean() > 0.99
    assert len(losses) == QUICK.steps
    assert torch.equal(start_N, learn_start(base, layout, people(4), QUICK))
    assert not torch.equal(start_N, learn_start(base, layout, people(4), dataclasses.replace(QUICK, seed=1)))


def test_A_is_learned_from_all_people(base: BaseModel, layout: LoRALayout) -> None:
    first = learn_start(base, layout, people(4)[:2], dataclasses.replace(QUICK, steps=2))
    both = learn_start(base, layout, people(4), dataclasses.replace(QUICK, steps=2))
    assert not torch.equal(first, both)


@pytest.mark.slow
def test_fine_tuning_is_faster_from_the_learned_start() -> None:
    """With A frozen, on people that the start never saw, of the shipped base model."""
    from lora_diffusion.world.people import render, sample_person, sample_view
    from lora_diffusion.world.people.captions import subject_caption

    def photos_of(number: int) -> PersonPhotos:
        person, views = sample_person(number), [sample_view(number, i) for i in range(4)]
        pixels = np.stack([render(person, view, 64).image for view in views])
        return PersonPhotos(person.name, pixels, tuple(subject_caption(view, person.traits) for view in views))

    base = BaseModel.from_pretrained("tiny-sd")
    layout = LoRALayout.from_unet(base.unet, rank=1, target_modules=("to_v", "conv1"))
    start_N = learn_start(base, layout, [photos_of(k) for k in range(200, 208)], StartConfig(24, 8, 2))
    strangers = [photos_of(k) for k in range(20_000, 20_004)]
    finetuner = Finetuner(base, layout, FinetuneConfig(steps=20, learning_rate=2e-2, train_A=False))
    learned, random = finetuner(strangers, start_N[None]), finetuner(strangers)
    assert (learned.loss_history_SK[-10:].mean(0) < random.loss_history_SK[-10:].mean(0)).all()


def test_too_few_people_or_photos_are_refused(base: BaseModel, layout: LoRALayout) -> None:
    with pytest.raises(ValueError, match="1 people: a step takes 2"):
        learn_start(base, layout, people(1), QUICK)
    with pytest.raises(ValueError, match="at least 2 photos"):
        learn_start(base, layout, people(2, photos=1), QUICK)


def test_start_file_must_fit_the_layout(base: BaseModel, layout: LoRALayout, tmp_path: Path) -> None:
    vector_N = initial_vectors(layout, 0)[0]
    path = formats.save(vector_N, layout, tmp_path / "start.safetensors", "vector")
    assert torch.equal(load_start(str(path), layout), vector_N)
    other = LoRALayout.from_unet(base.unet, rank=1, target_modules=("to_v",))
    with pytest.raises(ValueError, match=r"was made for layout .*learn_start.py, or set lora.start=null"):
        load_start(str(path), other)
    with pytest.raises(ValueError, match="does not exist"):
        load_start("tiny-strat", layout)


def test_start_of_another_base_is_refused(base: BaseModel, layout: LoRALayout, tmp_path: Path) -> None:
    vector_N = initial_vectors(layout, 0)[0]
    path = formats.save(vector_N, layout, tmp_path / "s.safetensors", "vector", metadata={"base": base.fingerprint})
    assert torch.equal(load_start(str(path), layout, base), vector_N)
    other = BaseModel.from_pipeline(tiny_pipeline(seed=1))
    with pytest.raises(
        ValueError,
        match=rf"learned with base model {base.fingerprint}, this one is {other.fingerprint}.*learn_start.py",
    ):
        load_start(str(path), layout, other)


@pytest.mark.slow
def test_job_learns_a_start_that_the_corpus_job_takes(tmp_path: Path) -> None:
    draw = FacesWriter(str(tmp_path / "people"), FacesConfig(views=4))
    draw({"numbers": [200, 201, 202]})
    job = [
        sys.executable,
        "jobs/world/learn_start.py",
        "--config",
        "configs/tiny.yaml",
        f"people={tmp_path / 'people'}",
    ]
    out = tmp_path / "start.safetensors"
    job.append(f"out={out}")
    options = ["training.steps=2", "training.people_per_step=2", "training.photos_per_person=1"]
    done = subprocess.run([*job, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 people of 3, 193,792 floats a LoRA" in done.stdout
    config = load_config(CorpusConfig, ROOT / "configs/tiny.yaml", [f"lora.start={out}"])
    shipped = LoRAMaker(load_config(CorpusConfig, ROOT / "configs/tiny.yaml", []))
    own = LoRAMaker(config)
    assert own.manifest().recipe["start"] != shipped.manifest().recipe["start"]
    refused = subprocess.run([*job, "training.steps=1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("learn_start: 3 people: a step takes 32")
