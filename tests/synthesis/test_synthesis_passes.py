"""Passes over the rows of a corpus: the same sums by any number of workers, also by more than there are pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_diffusion.corpus import Statistics
from lora_diffusion.synthesis.training import passes as module


class Rank:
    """One of several workers, whose sums are added up by the test."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize(("rows", "workers"), [(9, 4), (33, 8), (100, 16), (1000, 64), (2, 5), (300, 1)])
def test_every_worker_has_a_part_and_all_rows_are_seen_once(
    rows: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_merged", lambda group, part: part)
    values_PN = np.random.default_rng(0).normal(size=(rows, 3))
    parts: list[Any] = []
    for rank in range(workers):
        run = module.passes(Rank(rank, workers), np.arange(rows), lambda slots: values_PN[slots])  # type: ignore[arg-type]
        parts.append(run(Statistics.of))
    total = Statistics.merged(parts, 3)
    assert total.count == rows
    np.testing.assert_allclose(total.mean, values_PN.mean(0))
