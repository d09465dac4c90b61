"""Figures of verification against their definitions, counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from lora_diffusion.faces.embedder import unit
from lora_diffusion.world.recognisers.verification import (
    auc,
    pair_scores,
    rank1,
    tar_at_far,
    verification_report,
)


def clusters(people: int, photos: int, spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((people, 1, 64)).astype(np.float32))
    return unit(centres + spread * rng.standard_normal((people, photos, 64)).astype(np.float32) / 8)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 9, 50).astype(np.float32), rng.integers(0, 7, 80).astype(np.float32)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs))


def test_auc_of_one_kind_of_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        auc(np.ones(3, np.float32), np.ones(0, np.float32))


@pytest.mark.parametrize("far", [0.1, 0.01])
def test_tar_lets_no_more_than_far_of_the_strangers_pass(far: float) -> None:
    rng = np.random.default_rng(2)
    negative = rng.standard_normal(1000).astype(np.float32)
    positive = negative + 1
    tar = tar_at_far(positive, negative, far)
    threshold = np.sort(negative)[::-1][int(far * 1000)]
    assert (negative > threshold).mean() <= far
    assert tar == pytest.approx((positive > threshold).mean())
    assert tar > far


def test_tar_needs_enough_pairs_and_a_share() -> None:
    with pytest.raises(ValueError, match="at least 1000"):
        tar_at_far(np.ones(3, np.float32), np.zeros(999, np.float32), 1e-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        tar_at_far(np.ones(3, np.float32), np.zeros(999, np.float32), 1.0)


def test_pairs_are_split_by_person() -> None:
    photos = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    same, other = pair_scores(photos, np.array([0, 0, 1]), photos, np.array([0, 0, 1]))
    assert sorted(same) == [1, 1, 1, 1, 1]
    assert list(other) == [0, 0, 0, 0]


def test_rank1_counts_the_nearest_mean() -> None:
    gallery = np.eye(3, dtype=np.float32)[:, None]
    probes = np.array([[1, 0.1, 0], [0, 1, 0], [0, 0.9, 0.5]], np.float32)
    assert rank1(gallery, probes, np.array([0, 1, 2])) == pytest.approx(2 / 3)


def report_of(photos_PNE: np.ndarray, probes_PNE: np.ndarray | None = None) -> dict[str, float | int]:
    probes = photos_PNE[:, 5:] if probes_PNE is None else probes_PNE
    person = np.repeat(np.arange(len(probes)), probes.shape[1])
    return verification_report(photos_PNE[:, :5], probes.reshape(-1, 64), person, far=1e-2)


def test_tighter_clusters_give_better_figures_and_perfect_ones_give_one() -> None:
    perfect = report_of(clusters(40, 8, 0.01))
    assert (perfect["auc"], perfect["tar_at_far"], perfect["rank1_gallery"], perfect["rank1_one_photo"]) == (1, 1, 1, 1)
    good, poor = (report_of(clusters(40, 8, spread)) for spread in (1.0, 3.0))
    for name in ("auc", "tar_at_far", "rank1_gallery", "mean_same"):
        assert good[name] > poor[name]


def test_chance_level_is_told_as_chance() -> None:
    report = report_of(np.random.default_rng(3).standard_normal((100, 8, 64)).astype(np.float32))
    assert report["auc"] == pytest.approx(0.5, abs=0.03)
    assert report["tar_at_far"] == pytest.approx(0.01, abs=0.015)
    assert report["rank1_gallery"] < 0.06


def test_strangers_as_probes_are_told_apart_from_the_persons_own_photos() -> None:
    photos = clusters(30, 6, 0.1)
    assert report_of(photos)["rank1_gallery"] == 1
    report = report_of(photos, clusters(30, 2, 0.1, seed=9))
    assert report["probes"] == 60
    assert report["rank1_gallery"] < 0.3


def test_probes_without_labels_are_an_error() -> None:
    with pytest.raises(ValueError, match="one row a label"):
        verification_report(clusters(4, 5, 0.1), np.zeros((3, 64), np.float32), np.arange(4))
