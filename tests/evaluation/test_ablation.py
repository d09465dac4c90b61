"""Laws of the ablations: which runs there are, that they differ by one thing, and what is said about them."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from evaluation_world import RECOGNISERS

from lora_diffusion.evaluation.ablation import (
    AblationConfig,
    Variant,
    canonical_rows,
    distinct_parts,
    equal_parameters,
    plan,
    values_of,
)
from lora_diffusion.evaluation.ablation_results import compared
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.synthesis.denoiser import DenoiserConfig, count_parameters
from lora_diffusion.synthesis.training.dataset import CorpusRows, DataConfig

CONFIG = AblationConfig(corpora={"frozen_A": "elsewhere"}, other_seeds=1)


def test_every_run_differs_from_the_reference_by_one_factor_at_most() -> None:
    runs = plan(CONFIG, 2000)
    assert len(set(runs)) == len(runs)
    reference = asdict(CONFIG.reference)
    for run in runs:
        changed = [name for name, value in asdict(run).items() if name != "seed" and value != reference[name]]
        assert len(changed) <= 1, run
    for factor in CONFIG.factors:
        seen = {getattr(run, factor) for run in runs}
        assert seen == set(values_of(CONFIG, factor, 2000)), factor


def test_main_comparisons_have_more_seeds_and_early_runs_are_whole_comparisons() -> None:
    runs = plan(CONFIG, 2000)
    seeds_of = lambda **changed: {run.seed for run in runs if run == replace(Variant(**changed), seed=run.seed)}  # noqa: E731
    assert seeds_of(conditioning="adanorm") == {0, 1, 2}
    assert seeds_of(prior="corpus") == {0}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert runs[0] == CONFIG.reference


def test_sizes_that_the_corpus_does_not_have_are_left_out() -> None:
    assert values_of(CONFIG, "people", 600) == [250, 500, None]
    assert plan(replace(CONFIG, factors=("people",), people=(5000,)), 600) == [Variant(seed=s) for s in range(3)]


def test_code_spaces_that_are_too_dear_can_be_left_out_but_not_the_reference() -> None:
    assert values_of(replace(CONFIG, code_spaces=("pca",)), "code_space", 600) == ["pca", "latent"]


def test_parts_are_shared_by_runs_of_the_same_rows_and_form() -> None:
    parts = {variant.parts for variant in plan(CONFIG, 2000)}
    assert len(distinct_parts(plan(CONFIG, 2000))) == len(parts)
    assert Variant(seed=2, conditioning="adanorm").parts == Variant().parts
    assert Variant(code_space="vector").parts == Variant(code_space="pca").parts
    assert (
        len({Variant(people=5).parts, Variant(canonical=True).parts, Variant(corpus="b").parts, Variant().parts}) == 4
    )


def test_both_conditionings_have_as_many_parameters() -> None:
    adanorm = DenoiserConfig(width=48, depth=2, condition_width=48, conditioning="adanorm")
    adalora = equal_parameters(adanorm, 48)
    assert adalora.conditioning == "adalora"
    assert count_parameters(adalora, 48) == pytest.approx(count_parameters(adanorm, 48), rel=0.05)
    assert (
        equal_parameters(adanorm, 11_200) == adalora
    )  # no room for a match: the first and last layer outweigh the rest


def test_the_canonical_form_changes_vectors_and_not_what_they_do() -> None:
    layout = LoRALayout.from_shapes({"a.to_q": (6, 4)}, rank=1, alpha=1.0, target_modules=("to_q",))
    vectors = np.random.default_rng(0).normal(size=(12, layout.size)).astype(np.float32)
    zeros = np.zeros(12)
    faces, counts = np.eye(12, 512, dtype=np.float32), np.ones(12, int)
    rows = CorpusRows(vectors, faces, faces, counts, zeros, zeros, [f"p{i}" for i in range(12)], DataConfig())
    again = canonical_rows(rows, layout)
    slots = np.arange(12)
    assert not torch.allclose(again.vectors(slots), rows.vectors(slots), atol=1e-3)
    (A, B), (A2, B2) = (layout.split(r.vectors(slots))["a.to_q"] for r in (rows, again))
    torch.testing.assert_close(B2 @ A2, B @ A)
    assert again.train.tolist() == rows.train.tolist()


def record(variant: Variant, similarity: float, seed_noise: float = 0.0) -> dict[str, object]:
    rng = np.random.default_rng(5)
    people_K = similarity + rng.normal(0, 0.1, 30) + seed_noise
    values = [people_K.tolist()] * 2
    return {
        "name": str(variant),
        "variant": asdict(variant),
        "recognisers": RECOGNISERS,
        "parameters": 10,
        "rows": variant.people or 900,
        "figures": {"denoiser_validation_loss": 0.5, "reconstruction": {"r2": 0.9}},
        "curve": [{"step": 1, "loss": 1.0, "validation_loss": 1.0}, {"step": 2, "loss": 0.5, "validation_loss": 0.6}],
        "similarity_RK": {"1": values, "2": values},
        "best_similarity_RK": values,
        "rank1": dict.fromkeys(RECOGNISERS, 0.5),
        "prompt_accuracy": 0.7,
    }


def test_differences_are_of_the_same_people_and_of_any_seeds() -> None:
    config = AblationConfig(factors=("conditioning",), seeds=2)
    records = [
        record(Variant(conditioning=kind, seed=seed), level, 0.02 * seed)  # type: ignore[arg-type]
        for kind, level in (("adalora", 0.4), ("adanorm", 0.3))
        for seed in (0, 1)
    ]
    adanorm, adalora = compared(config, records, 1000)
    assert (adanorm["value"], adalora["value"]) == ("AdaNorm", "ADALoRA")
    gap = adanorm["best"]["tiny"]["minus_reference"]
    assert gap["mean"] == pytest.approx(-0.1, abs=1e-4)
    assert gap["high"] - gap["low"] == pytest.approx(0.04, abs=2e-3)  # people cancel, seeds need not
    assert adalora["reference"]
    assert "minus_reference" not in adalora["best"]["tiny"]
    assert np.diff(adalora["best"]["tiny"]["seeds"]) == pytest.approx(0.02, abs=1e-4)


def test_a_run_that_is_missing_is_left_out_of_the_table() -> None:
    config = AblationConfig(factors=("conditioning", "prior"), seeds=1)
    rows = compared(config, [record(Variant(), 0.4)], 1000)
    assert [(row["factor"], row["value"]) for row in rows] == [("conditioning", "ADALoRA"), ("prior", "Gaussian prior")]


def test_unknown_factors_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="unknown factors depth; choose from conditioning"):
        AblationConfig(factors=("depth",))
