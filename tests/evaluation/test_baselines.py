"""Laws of the baselines: regression finds a linear world, chooses its penalty by direction, and needs no row in memory twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from synthesis_world import toy
from torch import Tensor

from lora_diffusion.synthesis.baselines import (
    RidgeToPCA,
    RidgeToVector,
    deviation_cosine,
    fit_ridge,
    nearest_rows,
    principal_components,
)

DATA, HELD = toy(people=160, noise=0.3), toy(people=40, noise=0.0, seed=1)
TRAIN, VALIDATION = slice(0, 130), slice(130, 160)


def pairs(rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
    yield DATA.embeddings_PC[rows][:50], DATA.vectors_PN[rows][:50]
    yield DATA.embeddings_PC[rows][50:], DATA.vectors_PN[rows][50:]


def test_ridge_equals_the_normal_equations_with_an_intercept() -> None:
    e, x, penalty = DATA.embeddings_PC.double(), DATA.vectors_PN.double(), 1e-2
    e0, x0 = e - e.mean(0), x - x.mean(0)
    weights = torch.linalg.solve(e0.T @ e0 + penalty * len(e) * torch.eye(512, dtype=torch.float64), e0.T @ x0)
    (ridge,) = fit_ridge(
        [(DATA.embeddings_PC[:70], DATA.vectors_PN[:70]), (DATA.embeddings_PC[70:], DATA.vectors_PN[70:])], [penalty]
    )
    expected = x.mean(0) + (HELD.embeddings_PC.double() - e.mean(0)) @ weights
    torch.testing.assert_close(ridge.predict(HELD.embeddings_PC), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vector", "pca"])
def test_regression_points_towards_people_never_seen(kind: str) -> None:
    fits = lambda: pairs(TRAIN), lambda: pairs(VALIDATION)
    normaliser = DATA.normaliser
    if kind == "vector":
        found: RidgeToVector | RidgeToPCA = RidgeToVector.fit(*fits)
    else:
        pca = principal_components(normaliser, lambda: [DATA.vectors_PN[TRAIN]], 20)
        found = RidgeToPCA.fit(*fits, normaliser, pca, components=(1, 4, 20))
        assert found.components >= 4  # the world has four traits
    predicted = found.predict(HELD.embeddings_PC)
    assert deviation_cosine(predicted, HELD.vectors_PN, normaliser.mean_N) > 0.7
    strangers = deviation_cosine(predicted.roll(1, 0), HELD.vectors_PN, normaliser.mean_N)
    assert abs(strangers) < 0.3


def test_predictions_keep_what_never_varies() -> None:
    pca = principal_components(DATA.normaliser, lambda: [DATA.vectors_PN], 8)
    found = RidgeToPCA.fit(lambda: pairs(TRAIN), lambda: pairs(VALIDATION), DATA.normaliser, pca, components=(4,))
    predicted = found.predict(HELD.embeddings_PC)
    constant = torch.ones(predicted.shape[1], dtype=torch.bool)
    constant[DATA.normaliser.varying] = False
    assert constant.any()
    torch.testing.assert_close(predicted[:, constant], DATA.normaliser.mean_N[constant].expand(len(predicted), -1))


def test_the_mean_for_everybody_has_no_direction() -> None:
    mean_N = DATA.vectors_PN.mean(0)
    assert deviation_cosine(mean_N.expand(5, -1), DATA.vectors_PN[:5], mean_N) == pytest.approx(0, abs=1e-6)
    assert deviation_cosine(DATA.vectors_PN[:5] * 3 - 2 * mean_N, DATA.vectors_PN[:5], mean_N) == pytest.approx(
        1, abs=1e-5
    )


def test_a_person_of_the_corpus_is_their_own_nearest_neighbour() -> None:
    rows = torch.tensor([7, 3, 100])
    assert nearest_rows(5 * DATA.embeddings_PC[rows], DATA.embeddings_PC).tolist() == rows.tolist()


def test_one_row_is_no_corpus() -> None:
    with pytest.raises(ValueError, match="1 rows were given to the regression"):
        list(fit_ridge([(torch.ones(1, 512), torch.ones(1, 3))]))
    with pytest.raises(ValueError, match="0 rows"):
        list(fit_ridge([]))
    assert np.isfinite(deviation_cosine(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)))
