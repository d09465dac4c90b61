"""Every parameter at mean zero and unit variance over the corpus, and the parameters that never vary set aside.

A corpus with one shared, frozen A has as many constant columns as A has entries; a network that predicted them could
only do harm. They are left out of everything that is learned, and restored exactly.

Axes: B batch, N vector length, M varying parameters.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lora_diffusion.corpus.statistics import Statistics

BLOCK = 4096  # columns of a block


class Normaliser(nn.Module):
    """`normalise`: vectors (B, N) -> (B, M), `(v - mean) / std` of the varying parameters. `restore` is its inverse.

    A parameter varies if its standard deviation is more than float32 can tell from rounding (1e-7 of its mean).

    Args:
        mean_N, std_N: of the corpus' columns, in any float dtype; kept in float32.

    Raises:
        ValueError: shapes that differ, values that are not finite, or no parameter that varies.
    """

    mean_N: Tensor
    std_N: Tensor
    varying: Tensor

    def __init__(self, mean_N: Tensor, std_N: Tensor) -> None:
        super().__init__()
        if mean_N.ndim != 1 or mean_N.shape != std_N.shape:
            raise ValueError(
                f"mean has shape {tuple(mean_N.shape)} and std {tuple(std_N.shape)}; both must be (N,), one number a parameter"
            )
        if not bool(torch.isfinite(mean_N).all() & torch.isfinite(std_N).all()):
            raise ValueError(
                "mean or std hold NaN or infinity: leave diverged LoRAs out before the statistics are taken"
            )
        varies = std_N.double() > (1e-7 * mean_N.double().abs()).clamp(min=1e-12)
        if not bool(varies.any()):
            raise ValueError(
                f"none of the {len(mean_N)} parameters varies: the corpus holds one person, or copies of one. "
                "At least two different LoRAs are needed"
            )
        self.register_buffer("mean_N", mean_N.float().clone())
        self.register_buffer("std_N", std_N.float().clone())
        self.register_buffer("varying", varies.nonzero()[:, 0], persistent=False)
        self.register_buffer("_mean_M", self.mean_N[self.varying], persistent=False)
        self.register_buffer("_std_M", self.std_N[self.varying], persistent=False)
        self.blocks = _blocks(self.varying)

    @classmethod
    def from_statistics(cls, statistics: Statistics) -> Normaliser:
        """From what the corpus gathered while it was written (`CorpusReader.statistics()`)."""
        if statistics.count < 2:
            raise ValueError(
                f"the corpus has {statistics.count} LoRAs; at least two are needed to know how they vary. "
                "Build more of it with jobs/build_corpus.py"
            )
        return cls(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std))

    @property
    def vector_size(self) -> int:
        """N."""
        return len(self.mean_N)

    @property
    def size(self) -> int:
        """M."""
        return len(self.varying)

    def normalise(self, vectors_BN: Tensor) -> Tensor:
        """(B, M). Constant parameters are dropped, whatever values they have."""
        if vectors_BN.ndim != 2 or vectors_BN.shape[1] != self.vector_size:
            raise ValueError(
                f"vectors have shape {tuple(vectors_BN.shape)}; expected (B, {self.vector_size}), one row for each LoRA"
            )
        return (vectors_BN[:, self.varying].float() - self.get_buffer("_mean_M")) / self.get_buffer("_std_M")

    def restore(self, x_BM: Tensor, deviation_scale: float = 1.0) -> Tensor:
        """(B, N): inverse of `normalise`; constant parameters get the corpus' value, bit for bit. Gradients flow.

        `deviation_scale` multiplies the deviation from the mean.
        """
        mean_M, std_M = self.get_buffer("_mean_M"), self.get_buffer("_std_M")
        values_BM = torch.addcmul(mean_M, x_BM.float(), std_M, value=deviation_scale)
        if self.size == self.vector_size:
            return values_BM
        return self.mean_N.expand(len(x_BM), -1).index_copy(1, self.varying, values_BM)

    def restore_block(self, x_Bm: Tensor, block: slice, deviation_scale: float, out: Tensor) -> None:
        """`restore` of some varying parameters alone, into `out`."""
        mean_m, std_m = self.get_buffer("_mean_M")[block], self.get_buffer("_std_M")[block]
        torch.addcmul(mean_m, x_Bm, std_m, value=deviation_scale, out=out)


def _blocks(varying_M: Tensor) -> list[tuple[slice, slice]] | None:
    """The varying parameters as blocks of neighbours: where each lies in N and in M. None: there are too many to be of use."""
    ends = (varying_M.diff() != 1).nonzero()[:, 0] + 1
    if 64 * len(ends) > len(varying_M):
        return None
    found = []
    for begin, end in pairwise([0, *ends.tolist(), len(varying_M)]):
        shift = int(varying_M[begin]) - begin
        for at in range(begin, end, BLOCK):
            part = slice(at, min(at + BLOCK, end))
            found.append((slice(part.start + shift, part.stop + shift), part))
    return found
