"""Adapting a base model: the inner fine-tuning is the recipe's, photos held back stay so, and a killed run goes on alike."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from lora_diffusion.lora.finetune import initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.world.base.adaptation import AdaptationConfig, BaseAdapter
from lora_diffusion.world.base.adaptation_faces import AdaptationFaces
from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECIPE = FinetuneConfig(
    steps=5, batch_size=2, learning_rate=2e-2, warmup_steps=2, timestep_range=(100, 900), train_A=False
)
SMALL = AdaptationConfig(
    steps=6, people_per_step=3, described_photos=4, warmup_steps=2, ema_decay=0.5, checkpoint_every=2
)


def adapter(config: AdaptationConfig = SMALL, folder: Path | None = None, photos_each: int = 6) -> BaseAdapter:
    """Of a fresh small model, with random photos of four people."""
    torch.manual_seed(0)
    base = BaseModel.from_pipeline(tiny_pipeline())
    layout = LoRALayout.from_unet(base.unet, rank=2, target_modules=("to_v", "conv1"))
    draw = torch.Generator().manual_seed(1)
    count, length = 4 * photos_each, base.tokenizer.model_max_length
    faces = AdaptationFaces(
        torch.randn(count, *base.latent_shape, generator=draw),
        torch.rand(count, *base.latent_shape[1:], generator=draw) + 0.5,
        torch.randint(0, 50, (count, length), generator=draw),
        torch.randint(0, 50, (count, 3, length), generator=draw),
        photos_each,
    )
    return BaseAdapter(base, layout, initial_vectors(layout, 0)[0], faces, config, RECIPE, folder)


def test_people_are_fine_tuned_by_the_recipe() -> None:
    """AdamW by hand against torch's, one optimiser and one schedule for each person, on a base that stands still."""
    one = adapter(dataclasses.replace(SMALL, learning_rate=0.0, learning_rate_A=0.0))
    one.age_K[:] = [0, 3, 1]  # begins; ends in two steps, and another begins; under way
    own_K: list[torch.Tensor] = [torch.zeros_like(one.B_KB[:1]) for _ in range(3)]
    steps = {0: range(5), 1: range(2, 7), 2: range(4, 9)}  # of the run, in which whoever begins is watched to the end
    optimizers: dict[int, torch.optim.AdamW] = {}
    for step in range(9):
        inputs = one._next()
        for k in range(3):
            if step not in steps[k]:
                continue
            age = step - steps[k].start
            assert inputs["age_K"][k] == age
            if age == 0:
                own_K[k] = torch.zeros_like(own_K[k]).requires_grad_()
                optimizers[k] = torch.optim.AdamW(
                    [own_K[k]], betas=RECIPE.betas, eps=RECIPE.epsilon, weight_decay=RECIPE.weight_decay
                )
            everyone = torch.cat([own_K[j].detach() for j in range(3)]).index_copy(0, torch.tensor([k]), own_K[k])
            tokens = one.faces.scene_tokens[inputs["own_Kn"]]
            loss_K = one._loss("own", inputs["own_Kn"], tokens, one._vectors(one.A.detach(), everyone))
            (grad,) = torch.autograd.grad(loss_K[k], [own_K[k]])
            own_K[k].grad = grad
            torch.nn.utils.clip_grad_norm_([own_K[k]], RECIPE.max_grad_norm or 0)
            optimizers[k].param_groups[0]["lr"] = RECIPE.rate(age)
            optimizers[k].step()
        one._work(inputs)
        for k in range(3):
            if step in steps[k]:
                torch.testing.assert_close(one.B_KB[k], own_K[k][0].detach(), rtol=1e-4, atol=1e-6)


def test_other_photos_are_never_fine_tuned_on() -> None:
    one = adapter()
    for _ in range(40):
        inputs = one._next()
        begun = inputs["age_K"] == 0
        for k in range(3):
            own, other = set(inputs["own_Kn"][k].tolist()), set(inputs["other_Kn"][k].tolist())
            assert not own & other
            assert {photo // 6 for photo in own | other} == {one.people_K[k]}
            assert other <= {one.people_K[k] * 6 + place for place in one.order_KV[k][3:]}
            assert begun[k] or inputs["age_K"][k] < RECIPE.steps


def test_base_learns_and_ends_as_its_average() -> None:
    one = adapter()
    before = [parameter.detach().clone() for parameter in one.network]
    seen: list[dict[str, float]] = []
    one.run(lambda step, values: seen.append(values))
    assert len(seen) == SMALL.steps
    assert all(np.isfinite(list(values.values())).all() for values in seen)
    moved = [not torch.equal(a, b) for a, b in zip(before, one.network, strict=True)]
    assert np.mean(moved) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(one.ema, one.network, strict=True))
    assert not any(parameter.requires_grad for parameter in one.network)


def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = adapter()
    whole.run()

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 5:  # the last checkpoint is of step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapter(folder=tmp_path).run(stop)
    rest = adapter(folder=tmp_path)
    assert rest.step == 4
    rest.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.network, rest.network, strict=True))
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 there, 0.0001 now"):
        adapter(dataclasses.replace(SMALL, learning_rate=1e-4), folder=tmp_path)


def test_too_few_photos_are_refused() -> None:
    with pytest.raises(ValueError, match="3 photos of each person, 3 held back"):
        adapter(photos_each=3)


def test_job_writes_another_base(tmp_path: Path) -> None:
    settings = FacesConfig(views=4)
    FacesWriter(str(tmp_path / "faces"), settings)({"numbers": [200, 201]})
    FacesFolder(str(tmp_path / "faces"), settings).finish()

    small = {"steps": 2, "people_per_step": 2, "described_photos": 2, "other_photos": 1, "held_back": 1}
    options = [f"training.{name}={value}" for name, value in small.items()]
    options += [f"{name}={tmp_path / name}" for name in ("faces", "work", "out")]
    command = [sys.executable, "jobs/world/adapt_base.py", "--config", "configs/tiny.yaml", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 people, 8 photos" in done.stdout
    base = BaseModel.from_pretrained(str(tmp_path / "out"))
    assert base.fingerprint != BaseModel.from_pretrained("tiny-sd").fingerprint
