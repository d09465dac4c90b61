"""Attribute directions: strength in standard deviations, each attribute by itself; inversion and refinement of photos."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import PCACodes
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.synthesis.inversion import InversionConfig, invert, refine
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import fit_pca


def labelled(count: int = 600) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Codes with a beard along axis 0 and age along axis 1; the bearded are older, as people are."""
    rng = np.random.default_rng(0)
    beard = rng.random(count) < 0.4
    age = rng.normal(40, 10, count) + 12 * beard
    codes = 0.3 * rng.standard_normal((count, 8))
    codes[:, 0] += 2 * beard
    codes[:, 1] += 0.1 * (age - 40)
    return torch.from_numpy(codes).float(), {"beard": beard, "age": age}


def test_directions_point_to_their_own_attribute_although_attributes_go_together() -> None:
    codes, labels = labelled()
    together = AttributeDirections.fit(codes, labels)
    assert float(together.directions_AZ[0, 0]) > 0.98
    assert float(together.directions_AZ[1, 1]) > 0.98
    alone = AttributeDirections.fit(codes, {"beard": labels["beard"]})
    assert float(alone.directions_AZ[0, 1]) > 0.4  # what a single direction would drag along
    assert (together.separation_A > 0.8).all()


@pytest.mark.parametrize("strength", [-2.0, 0.0, 1.0, 3.0])
def test_strength_is_in_standard_deviations_of_the_corpus(strength: float) -> None:
    codes, labels = labelled()
    directions = AttributeDirections.fit(codes, labels)
    moved = directions.edit(codes, "age", strength)
    along, before = (c @ directions.directions_AZ[1] for c in (moved, codes))
    torch.testing.assert_close(along - before, torch.full((600,), strength * float(before.std(correction=0))))
    across = moved - codes - (moved - codes) @ directions.directions_AZ[1:2].T @ directions.directions_AZ[1:2]
    assert float(across.abs().max()) < 1e-4


def test_rows_without_a_label_are_left_out() -> None:
    codes, labels = labelled()
    blank = {name: np.asarray(values, np.float64).copy() for name, values in labels.items()}
    blank["age"][::2] = np.nan
    some = AttributeDirections.fit(codes, blank)
    half = AttributeDirections.fit(codes[1::2], {name: values[1::2] for name, values in labels.items()})
    torch.testing.assert_close(some.directions_AZ, half.directions_AZ)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "no labels"),
        ({"a": [1.0, 2.0]}, "2 labels for 5 codes"),
        ({"a": [1.0] * 5}, "same a"),
        ({"a": [1.0, 2, 3, 4, 5], "b": [2.0, 4, 6, 8, 10]}, "leave one of them out"),
        ({"a": [1.0, np.nan, np.nan, np.nan, np.nan]}, "1 rows have all labels"),
    ],
)
def test_labels_that_teach_nothing_are_refused(labels: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeDirections.fit(torch.randn(5, 3), labels)


def test_an_unknown_attribute_is_refused() -> None:
    codes, labels = labelled()
    with pytest.raises(ValueError, match="beard, age"):
        AttributeDirections.fit(codes, labels).edit(codes, "hat", 1)


@cache
def world() -> tuple[BaseModel, LoRALayout, PCACodes]:
    """A silent base model of 16 px, and a space of LoRAs that share A, as a corpus with `train_A: false` has it."""
    base = BaseModel.from_pipeline(tiny_pipeline())
    layout = LoRALayout.from_unet(base.unet, target_modules=("to_q", "to_v"))
    generator = torch.Generator().manual_seed(0)
    is_B = layout.mask_B()
    vectors = initial_vectors(layout, 0, 40)
    basis = torch.randn(5, int(is_B.sum()), generator=generator)
    vectors[:, is_B] = 2.0 * torch.randn(40, 5, generator=generator) @ basis
    normaliser = Normaliser(vectors.double().mean(0), vectors.double().std(0, correction=0))
    space = PCACodes(normaliser, fit_pca(lambda: [normaliser.normalise(vectors).numpy()], 5))
    space.standardise([vectors])
    return base, layout, space


def people() -> list[PersonPhotos]:
    rng = np.random.default_rng(0)
    return [PersonPhotos(name, rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)) for name in ("ada", "bob")]


SETTINGS = InversionConfig(steps=12, learning_rate=0.2, prior_weight=0.0, prompt="sks person")


def test_inversion_finds_codes_that_explain_the_photos_better() -> None:
    base, layout, space = world()
    result = invert(base, layout, space, people(), SETTINGS)
    assert result.codes_KZ.shape == (2, 5)
    # the same noise and timesteps again, from the found codes: lower than from the mean
    start, found = (
        invert(base, layout, space, people(), InversionConfig(steps=1, batch_size=16, prompt="sks person"), codes)
        for codes in (torch.zeros(2, 5), result.codes_KZ)
    )
    assert (found.loss_history_SK[0] < start.loss_history_SK[0]).all()


def test_a_person_is_inverted_the_same_alone_and_together() -> None:
    """To float error."""
    base, layout, space = world()
    together = invert(base, layout, space, people(), SETTINGS).codes_KZ
    alone = invert(base, layout, space, people()[1:], SETTINGS).codes_KZ
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_the_prior_keeps_codes_near_the_people_of_the_corpus() -> None:
    base, layout, space = world()
    strict = InversionConfig(**{**SETTINGS.__dict__, "prior_weight": 100.0})
    start = torch.full((2, 5), 1.0)
    near = invert(base, layout, space, people(), strict, start).codes_KZ
    assert float(near.abs().max()) < 0.9


def test_no_steps_change_nothing_and_wrong_starts_are_refused() -> None:
    base, layout, space = world()
    start = torch.randn(2, 5)
    none = InversionConfig(steps=0)
    assert torch.equal(invert(base, layout, space, people(), none, start).codes_KZ, start)
    with pytest.raises(ValueError, match=r"expected \(2, 5\)"):
        invert(base, layout, space, people(), none, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="nobody to invert"):
        invert(base, layout, space, [], none)


def test_refining_is_fine_tuning_from_the_synthesised_lora() -> None:
    base, layout, space = world()
    start = space.decode(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    config = FinetuneConfig(steps=50, average_last=10, train_A=False, instance_prompt="sks person")
    refined = refine(base, layout, people(), start, 2, config)
    same = Finetuner(base, layout, FinetuneConfig(steps=2, average_last=2, train_A=False, instance_prompt="sks person"))
    assert np.array_equal(refined.vectors_KN, same(people(), start).vectors_KN)
    unchanged = refine(base, layout, people(), start, 0, config)
    assert np.array_equal(unchanged.vectors_KN, start.numpy())
    is_A = ~layout.mask_B().numpy()
    assert np.array_equal(refined.vectors_KN[:, is_A], start.numpy()[:, is_A])
    assert not np.array_equal(refined.vectors_KN, start.numpy())
