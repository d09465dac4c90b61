"""Passes over the rows of a corpus, each worker over its share.

Axes: P rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_diffusion.corpus import Statistics
from lora_diffusion.synthesis.pca import MapReduce, Product
from lora_diffusion.training.distributed import Group


def passes(
    group: Group, slots_P: NDArray[np.int64], rows: Callable[[NDArray[np.int64]], NDArray[Any]], chunk: int = 128
) -> MapReduce:
    """Passes over `rows(slots)`, for `fit_pca_distributed`: each worker has consecutive rows, or none, and what comes out
    (`Statistics`, `Product`) is added up in the order of the rows."""
    mine = np.array_split(slots_P, group.world_size)[group.rank]

    def run(function: Callable[[NDArray[Any]], Any]) -> Any:
        parts = (function(rows(mine[start : start + chunk])) for start in range(0, max(1, len(mine)), chunk))
        return _merged(group, functools.reduce(lambda a, b: a.merge(b), parts))

    return run


def _merged(group: Group, part: Any) -> Any:
    if group.world_size == 1:
        return part
    if isinstance(part, Product):
        return Product(group.sum(torch.from_numpy(part.sum)).numpy())
    assert isinstance(part, Statistics), f"{type(part)} is not known to be a sum"
    counts = group.gather(np.array([part.count]))
    means, M2s = group.gather(part.mean), group.gather(part.M2)
    parts = [Statistics(int(count[0]), mean, M2) for count, mean, M2 in zip(counts, means, M2s, strict=True)]
    return Statistics.merged(parts, len(part.mean))
