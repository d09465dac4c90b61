"""A base model's fingerprint is of the model: not of dtype, device, file names, or the release that saved it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import tiny_pipeline

from lora_diffusion.models.stable_diffusion import BaseModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of tiny-sd: before its decoder was sharpened; and as releases before that computed it, in each dtype
OLD = ("b486db5bb0ed5c8a64c0", "95a6a9ba0026c015", "7dc10c716f5bdcf6", "254dc543938cbd06")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_a_model_is_the_same_in_every_dtype_and_from_half_precision_files(folder: Path, tmp_path: Path) -> None:
    loaded = [BaseModel.from_pretrained(str(folder), dtype=dtype) for dtype in DTYPES]
    assert [base.dtype for base in loaded] == list(DTYPES)
    fingerprint = loaded[0].fingerprint
    assert len(fingerprint) == 20
    assert [base.fingerprint for base in loaded] == [fingerprint] * 3
    assert dataclasses.replace(loaded[1]).fingerprint == fingerprint
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    assert BaseModel.from_pipeline(pipe).fingerprint == fingerprint
    pipe.save_pretrained(tmp_path / "half")
    assert BaseModel.from_pretrained(str(tmp_path / "half")).fingerprint == fingerprint


def test_weights_are_rounded_to_bfloat16_as_diffusers_does_it(folder: Path) -> None:
    ours = BaseModel.from_pretrained(str(folder), dtype=torch.bfloat16)
    theirs = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(theirs, part).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(ours, part).state_dict().items())


def test_another_weight_or_noise_schedule_is_another_model() -> None:
    def fingerprint(part: str = "", **schedule: object) -> str:
        torch.manual_seed(0)
        pipe = tiny_pipeline()
        if part:
            with torch.no_grad():
                next(getattr(pipe, part).parameters()).flatten()[-1] += 0.01
        pipe.scheduler.register_to_config(**schedule)
        return BaseModel.from_pipeline(pipe).fingerprint

    others = [fingerprint(part) for part in ("unet", "vae", "text_encoder")]
    others += [fingerprint(prediction_type="v_prediction"), fingerprint(beta_end=0.03)]
    assert len({fingerprint(), *others}) == 6
    assert fingerprint() == fingerprint(clip_sample=False, steps_offset=1), "how to sample is no part of the model"


def test_tensors_may_have_other_names_and_another_order() -> None:
    torch.manual_seed(0)
    base = BaseModel.from_pipeline(tiny_pipeline())
    fingerprint = base.fingerprint
    renamed = torch.nn.Module()
    for i, tensor in enumerate(reversed(list(base.text_encoder.state_dict().values()))):
        renamed.register_buffer(f"weight{i}", tensor)
    assert dataclasses.replace(base, text_encoder=renamed).fingerprint == fingerprint


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_earlier_releases_called_the_model_is_still_known(dtype: torch.dtype) -> None:
    base = BaseModel.from_pretrained("tiny-sd", dtype=dtype)
    assert all(base.knows(old) for old in (*OLD, base.fingerprint))
    assert not any(base.knows(other) for other in ("", "0123456789abcdef", "0123456789abcdef0123", OLD[0][:-1] + "6"))


def test_a_pipeline_without_files_knows_its_old_fingerprint_and_no_other() -> None:
    base = BaseModel.from_pipeline(tiny_pipeline())
    (old,) = list(base._old_fingerprints())[:1]
    assert base.knows(old)
    assert not base.knows("0123456789abcdef")
