"""Laws of the evaluation: what intervals, comparisons and scales say about scores whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_world import RECOGNISERS, held_out, methods_of, scores_of

from lora_diffusion.evaluation import EvaluationConfig, Method
from lora_diffusion.evaluation.methods import label, with_scales
from lora_diffusion.evaluation.pipeline import batches
from lora_diffusion.evaluation.results import compare, cross_fitted, order, share_of_gain, tabulate
from lora_diffusion.evaluation.scoring import Scores, _diversity, pictures_of, score_key
from lora_diffusion.evaluation.similarity import nearest_own
from lora_diffusion.evaluation.wire import pack, unpack

SYNTH = "synthesised:latent"


def test_half_way_from_base_to_ceiling_is_half_of_the_gain() -> None:
    rng = np.random.default_rng(0)
    base_K = rng.normal(0, 0.02, 60).astype(np.float32)
    ceiling_K = base_K + 0.3
    share = share_of_gain(base_K + 0.15, base_K, ceiling_K)
    assert share["mean"] == pytest.approx(0.5)
    assert share["low"] == share["high"] == pytest.approx(0.5)  # everybody gains half, whoever is drawn


def test_without_a_gain_there_is_no_share_of_it() -> None:
    zeros_K = np.zeros(5, np.float32)
    assert share_of_gain(zeros_K + 0.1, zeros_K, zeros_K)["mean"] is None


def test_a_gain_that_may_be_none_gives_a_share_without_an_interval() -> None:
    ceiling_K = np.array([0.5, -0.3, 0.1], np.float32)
    zeros_K = np.zeros(3, np.float32)
    assert share_of_gain(ceiling_K / 2, zeros_K, ceiling_K) == {"mean": 0.5, "low": None, "high": None}


def test_the_same_people_are_compared_so_what_they_share_does_not_widen_the_interval() -> None:
    people_K = np.random.default_rng(0).normal(0.3, 0.2, 50).astype(np.float32)
    difference = compare(people_K + 0.01, people_K)
    assert difference["low"] == pytest.approx(0.01, abs=1e-4)
    assert difference["high"] == pytest.approx(0.01, abs=1e-4)


def test_a_scale_is_judged_on_people_who_did_not_choose_it() -> None:
    """Even people are best at 2, odd ones at 1: each half gets what is best for the other one."""
    even_K = np.arange(10) % 2 == 0
    by_scale = {1.0: np.where(even_K, 0.0, 1.0)[None], 2.0: np.where(even_K, 1.0, 0.0)[None]}
    values_RK, chosen = cross_fitted({s: v.astype(np.float32) for s, v in by_scale.items()})
    assert values_RK.sum() == 0
    assert chosen == [1.0, 2.0]


def test_scaling_is_about_the_mean_and_leaves_controls_alone() -> None:
    mean_N = np.array([1.0, 2.0], np.float32)
    method = Method.of("ridge_pca", np.array([[2.0, 0.0]], np.float32))
    found = with_scales([method, Method.of("base", np.zeros((1, 2)))], (1.0, 1.5), mean_N)
    assert [m.id for m in found] == ["ridge_pca", "ridge_pca@1.5", "base"]
    np.testing.assert_allclose(found[1].vectors_KSN[0, 0], [2.5, -1.0])
    np.testing.assert_allclose(found[1].scaled(3.0, mean_N).vectors_KSN[0, 0], [4.0, -4.0])


def test_every_method_draws_a_person_with_the_same_noise_and_another_person_with_other_noise() -> None:
    config = EvaluationConfig().render
    prompts, seeds = pictures_of(config, [0, 3, 0])
    each = len(config.prompts)
    assert prompts == [*config.prompts] * 3
    assert seeds[:each] == seeds[2 * each :]
    assert not set(seeds[:each]) & set(seeds[each : 2 * each])


def test_a_lora_that_draws_no_face_is_nobody_and_not_various() -> None:
    """Cosines are 0 then: the first person was right by chance, and samples seemed as different as can be."""
    assert nearest_own(np.zeros((3, 3), np.float32), np.arange(3)).tolist() == [0, 0, 0]
    assert nearest_own(np.array([[0.2, 0.1], [0.3, 0.3], [-0.3, -0.2]], np.float32), np.array([0, 0, 1])).tolist() == [
        1,
        0,
        1,
    ]
    same = np.tile(np.eye(1, 8, dtype=np.float32), (4, 2, 1))
    found = np.ones((4, 2), bool)
    assert _diversity(same, found) == pytest.approx(0)
    same[1, 0], found[1, 0] = 0, False
    assert _diversity(same, found) == pytest.approx(0)
    assert np.isnan(_diversity(same * 0, found & False))
    assert np.isnan(_diversity(same[:1], found[:1]))


def test_scores_come_back_from_the_store_as_they_were() -> None:
    scores = scores_of(Method.of("base", np.zeros((6, 3))), held_out(6), 0.3)
    again = Scores.from_bytes(scores.to_bytes())
    for name, value in vars(scores).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_the_key_of_scores_changes_with_vectors_pictures_and_people_only() -> None:
    config, method = EvaluationConfig(), Method.of("base", np.zeros((2, 3)))
    key = score_key(method, config, "held", "base", "layout")
    moved = Method.of("another name", np.zeros((2, 3)))
    assert score_key(moved, EvaluationConfig(output="elsewhere", workers=7), "held", "base", "layout") == key
    others = [
        score_key(Method.of("base", np.ones((2, 3))), config, "held", "base", "layout"),
        score_key(method, config, "other people", "base", "layout"),
        score_key(method, config, "held", "other model", "layout"),
        score_key(method, config, "held", "base", "other layout"),
        score_key(method, EvaluationConfig(second_recogniser=None), "held", "base", "layout"),
        score_key(method, EvaluationConfig(prompt_scorer="a:B"), "held", "base", "layout"),
    ]
    assert len({key, *others}) == 7


def test_who_is_drawn_together_does_not_hang_on_what_else_is_drawn() -> None:
    """Else the scores of a killed evaluation would not be the undisturbed one's, to the last bit."""
    methods = [Method.of("a", np.zeros((5, 2))), Method.of("b", np.ones((4, 2)))]
    found = batches(methods, size=4)
    assert [len(batch) for batch in found] == [4, 1, 4]
    alone = [batch for method in methods for batch in batches([method], size=4)]
    assert [[(r.method, r.person) for r in batch] for batch in found] == [
        [(r.method, r.person) for r in batch] for batch in alone
    ]
    assert [(r.method, r.person) for batch in found for r in batch] == [
        *(("a", k) for k in range(5)),
        *(("b", k) for k in range(4)),
    ]
    again = unpack(type(found[0][0]), pack(found[0][0]))
    assert again.method == "a"
    np.testing.assert_array_equal(again.vectors_SN, found[0][0].vectors_SN)


def test_the_table_ranks_methods_as_they_were_made() -> None:
    held, methods, scores = methods_of(24)
    table = tabulate(methods, scores, held, RECOGNISERS, SYNTH)["methods"]
    similarity = {name: entry["by"]["tiny"]["similarity"]["mean"] for name, entry in table.items()}
    assert similarity["base"] < similarity["nearest"] < similarity[SYNTH] < similarity["finetuned"]
    assert table["finetuned"]["by"]["tiny"]["share_of_gain"]["mean"] == pytest.approx(1)
    assert table[SYNTH]["by"]["tiny"]["rank1"]["mean"] == 1
    assert table["nearest"]["by"]["tiny"]["reference_minus_this"]["low"] > 0
    assert table[SYNTH]["best_scale"]["chosen"] == [1.5, 1.5]
    assert table[SYNTH]["diversity"]["samples"] == 4


def test_methods_are_told_in_a_fixed_order_with_words_of_their_own() -> None:
    names = ["finetuned", SYNTH, "base", "reconstructed:latent", "nearest"]
    assert order(names) == ["base", "nearest", SYNTH, "finetuned", "reconstructed:latent"]
    assert len({label(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scales": (2.0,)}, "hold 1.0"),
        ({"limit": 1}, "at least 2 people"),
        ({"reference": "pca"}, "none of the synthesizers"),
        ({"diversity_samples": 1}, "cannot differ from itself"),
    ],
)
def test_settings_that_measure_nothing_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**values)  # type: ignore[arg-type]


def test_one_recogniser_chooses_the_scale_and_the_others_only_judge() -> None:
    """They are told by what the first one likes best, though they like the other scale."""
    by_scale = {1.0: np.array([[1.0] * 6, [0.0] * 6], np.float32), 2.0: np.array([[0.0] * 6, [1.0] * 6], np.float32)}
    for chooser, best in ((0, 1.0), (1, 2.0)):
        values_RK, chosen = cross_fitted(by_scale, chooser)
        assert chosen == [best, best]
        np.testing.assert_array_equal(values_RK, by_scale[best])
    np.testing.assert_array_equal(cross_fitted(by_scale)[0], by_scale[1.0])
