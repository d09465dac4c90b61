"""Evaluation: similarities beside their controls, on embeddings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lora_diffusion.evaluation.similarity import bootstrap, similarity_report
from lora_diffusion.faces.embedder import unit


def people(count: int = 6) -> np.ndarray:
    """(K, E) orthogonal identities."""
    return np.eye(count, 512, dtype=np.float32)


def test_perfect_renders_reach_the_photos_and_strangers_do_not() -> None:
    identities_KE = people()
    renders_KPE = np.repeat(identities_KE[:, None], 4, 1)
    photos = [np.repeat(identity[None], 3, 0) for identity in identities_KE]
    stranger_PE = np.roll(np.eye(4, 512, dtype=np.float32), 100, 1)
    report = similarity_report(renders_KPE, np.ones((6, 4), bool), stranger_PE, photos)
    assert report.own.mean == 1
    assert report.share_of_photos == 1
    assert report.rank1 == 1
    assert report.base.mean == report.other.mean == 0


def test_swapped_people_are_seen() -> None:
    identities_KE = people()
    renders_KPE = np.repeat(np.roll(identities_KE, 1, 0)[:, None], 2, 1)
    photos = [np.repeat(identity[None], 3, 0) for identity in identities_KE]
    report = similarity_report(renders_KPE, np.ones((6, 2), bool), renders_KPE[0], photos)
    assert report.own.mean == 0
    assert report.rank1 == 0
    assert report.other.mean > 0


def test_a_render_without_a_face_counts_as_nothing() -> None:
    identities_KE = people()
    renders_KPE = np.repeat(identities_KE[:, None], 2, 1)
    renders_KPE[:, 1] = 0
    found = np.ones((6, 2), bool)
    found[:, 1] = False
    report = similarity_report(renders_KPE, found, renders_KPE[0], [np.repeat(i[None], 2, 0) for i in identities_KE])
    assert report.own.mean == 0.5
    assert report.faces_found == 0.5


def test_the_interval_holds_the_mean_and_shrinks_with_people() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 400).astype(np.float32)
    few, many = bootstrap(values[:20]), bootstrap(values)
    assert few.low < few.mean < few.high
    assert many.high - many.low < few.high - few.low


def test_unit_leaves_no_nan_for_a_zero_vector() -> None:
    assert np.isfinite(unit(np.zeros((1, 4), np.float32))).all()


def test_the_bases_interval_is_over_people_and_a_photo_is_no_part_of_its_own_ceiling() -> None:
    identities_KE = people()
    alike_QE = [
        np.stack([0.6 * one + 0.8 * other, one])
        for one, other in zip(identities_KE, np.roll(identities_KE, 1, 1), strict=True)
    ]
    renders_KPE = identities_KE[:, None].repeat(2, 1)
    report = similarity_report(renders_KPE, np.ones((6, 2), bool), identities_KE[:1].repeat(2, 0), alike_QE)
    assert report.photos.mean == pytest.approx(0.6)
    assert report.share_of_photos == pytest.approx(report.own.mean / 0.6)
    assert report.base.low < report.base.mean < report.base.high, "people whom the same pictures resemble unlike"


def test_the_interval_is_that_of_95_percent() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    found = bootstrap(values)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)
