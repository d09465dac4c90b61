"""Count, mean and standard deviation of each entry of the LoRA vectors, gathered shard by shard.

Each shard's part is computed once, in float64, when the shard is written. The parts are merged in the order of the
shards, whatever the order in which they were finished, so the result is the same to the last bit after any
interruption.

Axes: P people, N length of a LoRA vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lora_diffusion.artifacts import checksum


@dataclass(frozen=True)
class Statistics:
    """`count` vectors with mean (N,) and sum of squared deviations from it `M2` (N,), both float64."""

    count: int
    mean: np.ndarray
    M2: np.ndarray

    @classmethod
    def empty(cls, size: int) -> Statistics:
        return cls(0, np.zeros(size), np.zeros(size))

    @classmethod
    def of(cls, vectors_PN: np.ndarray) -> Statistics:
        """Statistics of the rows, as they are stored (cast to float16 first if that is what the corpus holds)."""
        if len(vectors_PN) == 0:
            return cls.empty(vectors_PN.shape[1])
        values = vectors_PN.astype(np.float64)
        mean = values.mean(axis=0)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0))

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets together (Chan, Golub, LeVeque 1979: no cancellation, unlike sums of squares)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics of vectors of {len(self.mean)} and of {len(other.mean)} entries do not merge")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Statistics(count, mean, self.M2 + other.M2 + np.square(delta) * (self.count * other.count / count))

    @classmethod
    def merged(cls, parts: Iterable[Statistics], size: int) -> Statistics:
        """All parts, from the left. The order matters in the last bits: give them in the order of the shards."""
        total = cls.empty(size)
        for part in parts:
            total = total.merge(part)
        return total

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population, (N,): divided by count, not count - 1. Zeros for no people."""
        return np.sqrt(self.M2 / max(1, self.count))

    def to_bytes(self, about: Mapping[str, str] | None = None) -> bytes:
        """A safetensors file: `mean`, `M2`, `std` (for readers that do not compute), all float64, and `count`; `about` in its header."""
        tensors = {"count": np.array([self.count], np.int64), "mean": self.mean, "M2": self.M2, "std": self.std}
        return checksum.seal(save(tensors, dict(about) if about else None))

    @classmethod
    def from_bytes(cls, data: bytes) -> Statistics:
        """Inverse of `to_bytes`. Raises ValueError for anything else."""
        try:
            checksum.check(data)
            tensors = load(data)
            count, mean, M2 = tensors["count"], tensors["mean"], tensors["M2"]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"no statistics of a corpus: {error}") from error
        if count.shape != (1,) or mean.ndim != 1 or mean.shape != M2.shape or not mean.dtype == M2.dtype == np.float64:
            raise ValueError(f"no statistics of a corpus: mean is {mean.dtype} {mean.shape}, M2 {M2.dtype} {M2.shape}")
        return cls(int(count[0]), mean, M2)
