"""Embeddings have length 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""Lengths of what was divided by its length once differ from 1 by less, in float32."""


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """The same directions at length 1, float32, over the last axis; a vector of zeros stays one.

    What has length 1 already comes back bit for bit: an embedding that went through JSON gives the same LoRA.
    """
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    divisors = np.where(np.abs(norms - 1) < ROUNDING, 1, np.maximum(norms, 1e-12))
    return np.asarray(vectors / divisors, np.float32)
