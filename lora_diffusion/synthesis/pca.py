"""Principal components of a corpus that need not fit into memory.

The rows come in chunks, several times over. Each pass maps a chunk to a partial sum and adds the partial sums up, so
that a pass can run on many machines; only what is added up meets on one:

1. moments: count, mean and variance of each column, (M,) (`corpus.statistics.Statistics`);
2. few rows: the rows themselves, whose (P, P) Gram matrix gives the exact components. Its eigenvectors U and
   eigenvalues s² are those of the SVD X = U diag(s) Vᵀ, and V = Xᵀ U / s;
   or few columns: the scatter (M, M), exact as well;
   or else, for `iterations` passes, the product of the scatter with a basis (M, L), `Σ x (xᵀ Q)`, orthonormalised
   after each: subspace iteration (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.4), L = K + oversampling.
   The last pass also gives the Rayleigh-Ritz values, `Qᵀ S Q`: the variances along the components, exact for them.

Few rows are mostly the optimiser's noise, which has the larger variance. With a `smoother_PP`, Ŷ = H X, the components are those
of Ŷ: reduced-rank regression (Izenman 1975), where H is that of a ridge regression from the embeddings.

Variances are those of the population (divided by the count), as in the normaliser, so that the total of normalised
columns is M.

Axes: P rows of a chunk or corpus, M columns, K components, L = K + oversampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.corpus.statistics import Statistics

Floats = NDArray[np.floating[Any]]
Chunks = Callable[[], Iterable[Floats]]


class PCA(nn.Module):
    """`encode`: x (B, M) -> coefficients (B, K), `(x - mean) Vᵀ`; `decode`: back. Rows of `components_KM` are orthonormal.

    `explained_variance_K` falls; `total_variance` is that of all components, so their ratio is the share explained.
    """

    mean_M: Tensor
    components_KM: Tensor
    explained_variance_K: Tensor
    total_variance: Tensor

    def __init__(
        self, mean_M: Tensor, components_KM: Tensor, explained_variance_K: Tensor, total_variance: Tensor | float
    ) -> None:
        super().__init__()
        self.register_buffer("mean_M", mean_M.float())
        self.register_buffer("components_KM", components_KM.float())
        self.register_buffer("explained_variance_K", explained_variance_K.float())
        self.register_buffer("total_variance", torch.as_tensor(total_variance, dtype=torch.float32))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PCA:
        """Of its `state_dict`, as it was saved. Raises ValueError for anything else."""
        names = ("mean_M", "components_KM", "explained_variance_K", "total_variance")
        shapes = [tuple(tensors[name].shape) if name in tensors else None for name in names]
        size = shapes[1] or ()
        if len(size) != 2 or shapes != [size[1:], size, size[:1], ()]:
            raise ValueError(f"no principal components: {dict(zip(names, shapes, strict=True))}. Delete the file")
        return cls(*(tensors[name] for name in names))

    def __len__(self) -> int:
        """K."""
        return len(self.components_KM)

    def encode(self, x_BM: Tensor) -> Tensor:
        return (x_BM - self.mean_M) @ self.components_KM.T

    def decode(self, coefficients_BK: Tensor) -> Tensor:
        return self.mean_M + coefficients_BK @ self.components_KM

    def truncated(self, num_components: int) -> PCA:
        """The first components only."""
        if not 1 <= num_components <= len(self):
            raise ValueError(f"{num_components} components asked for; this PCA has {len(self)}")
        return PCA(
            self.mean_M,
            self.components_KM[:num_components],
            self.explained_variance_K[:num_components],
            self.total_variance,
        )

    def curve(self) -> list[float]:
        """Share of the total variance that the first 1, 2, ..., K components explain (the paper's Figure 3)."""
        shares = self.explained_variance_K.double().cumsum(0) / self.total_variance.double()
        return [float(share) for share in shares]


class Partial(Protocol):
    """What one chunk adds to a pass."""

    def merge(self, other: Any) -> Any: ...


P = TypeVar("P", bound=Partial)


class MapReduce(Protocol):
    """Runs a function over all chunks of the corpus and merges the results; on one machine or on many.

    The order of merging matters in the last bits only.
    """

    def __call__(self, function: Callable[[Floats], P], /) -> P: ...


@dataclass(frozen=True)
class Rows:
    """The chunk itself, as float32: for few rows."""

    parts: tuple[Floats, ...]

    def merge(self, other: Rows) -> Rows:
        return Rows(self.parts + other.parts)


@dataclass(frozen=True)
class Product:
    """`Σ x (xᵀ Q)` of centred rows (M, L), or the scatter `Σ x xᵀ` (M, M) where Q is the identity."""

    sum: Floats

    @classmethod
    def of(cls, rows_PM: Floats, mean_M: Floats, basis_ML: Floats | None = None) -> Product:
        x_PM = rows_PM.astype(mean_M.dtype) - mean_M
        return cls(x_PM.T @ (x_PM if basis_ML is None else x_PM @ basis_ML))

    def merge(self, other: Product) -> Product:
        return Product(self.sum + other.sum)


def fit_pca(chunks: Chunks, num_components: int, **settings: Any) -> PCA:
    """As `fit_pca_distributed`, of the rows that `chunks()` yields as arrays (P, M), here and one after the other.

    Each call of `chunks` must start a new round over all rows.
    """

    def map_reduce(function: Callable[[Floats], P]) -> P:
        parts = (function(chunk) for chunk in chunks() if len(chunk))
        return functools.reduce(lambda a, b: a.merge(b), parts)

    return fit_pca_distributed(map_reduce, num_components, **settings)


def fit_pca_distributed(
    map_reduce: MapReduce,
    num_components: int,
    *,
    exact_rows: int = 4096,
    exact_columns: int = 4096,
    oversampling: int = 32,
    iterations: int = 6,
    seed: int = 0,
    smoother_PP: Floats | None = None,
) -> PCA:
    """PCA of rows in chunks (P, M), in passes: `map_reduce(f)` returns the merged `f(chunk)` of all chunks.

    Exact up to `exact_rows` rows (memory: rows × M floats and a rows² matrix) or `exact_columns` columns (an M² matrix),
    randomised beyond (memory: three times M × (K + oversampling) floats, and a chunk).
    There are at most as many components as the rank of the centred rows: fewer than asked for, if they are not there.

    smoother_PP: the components are those of `smoother_PP @ rows`, and so are the explained variances; the total stays that
        of the rows. The centred rows are meant, in the order of the chunks, and no more than `exact_rows` of them.

    Raises:
        ValueError: no rows, chunks of different widths, values that are not finite, or a smoother that does not fit.
    """
    if num_components < 1:
        raise ValueError(f"{num_components} components asked for; at least one is needed")
    try:
        moments = map_reduce(Statistics.of)
    except TypeError as error:
        if "empty" not in str(error):
            raise
        raise ValueError("the corpus has no rows: there is nothing to analyse") from error
    if not np.isfinite(moments.M2).all():
        raise ValueError("the rows hold NaN or infinity: leave diverged LoRAs out first")
    rows, columns = moments.count, len(moments.mean)
    if rows < 2:
        raise ValueError(f"the corpus has {rows} row; at least two are needed to know how they vary")
    if not moments.M2.any():
        raise ValueError(f"all {rows} rows are the same: they do not vary, and have no components")
    if smoother_PP is not None and (rows > exact_rows or smoother_PP.shape != (rows, rows)):
        raise ValueError(
            f"the smoother is {smoother_PP.shape} for {rows:,} rows; it must be square, for at most {exact_rows:,} rows "
            "(exact_rows)"
        )
    mean_M, smallest = moments.mean, 1e-12  # of the largest variance; below it lies rounding
    if rows <= exact_rows:
        variances, components = _from_rows(map_reduce(lambda chunk: Rows((chunk,))), mean_M, smoother_PP)
    elif columns <= exact_columns:
        scatter = map_reduce(functools.partial(Product.of, mean_M=mean_M)).sum
        values, vectors = np.linalg.eigh(scatter / rows)
        variances, components = values[::-1], vectors[:, ::-1].T
    else:
        smallest = 1e-6  # products are in float32
        width = min(num_components + oversampling, rows - 1, columns)
        variances, components = _randomised(map_reduce, mean_M, rows, width, iterations, seed)
    rank = int((variances > variances[0] * smallest).sum())
    keep = min(num_components, rank, rows - 1)
    variances, components = variances[:keep], _fix_signs(components[:keep])
    return PCA(
        torch.from_numpy(mean_M),
        torch.from_numpy(np.ascontiguousarray(components, np.float32)),
        torch.from_numpy(np.ascontiguousarray(variances)),
        float(moments.M2.sum() / rows),
    )


def _from_rows(
    rows: Rows, mean_M: Floats, smoother_PP: Floats | None = None, block: int = 4096
) -> tuple[Floats, Floats]:
    """Exact, from the Gram matrix. Summed in float64 a block of columns at a time: no second copy of all rows."""
    x_PM = np.concatenate([np.asarray(part, np.float32) for part in rows.parts])
    count, columns = x_PM.shape
    gram_PP = np.zeros((count, count))
    for start in range(0, columns, block):
        piece = x_PM[:, start : start + block] - mean_M[start : start + block]
        gram_PP += piece @ piece.T
    if smoother_PP is not None:
        gram_PP = smoother_PP @ gram_PP @ smoother_PP.T
    values, U = np.linalg.eigh(gram_PP)
    values, U = values[::-1], U[:, ::-1]
    keep = values > max(values[0], 0) * 1e-12
    values, U = values[keep], U[:, keep]
    components = np.empty((len(values), columns), np.float32)
    U_smooth = U if smoother_PP is None else smoother_PP.T @ U
    for start in range(0, columns, block):
        piece = x_PM[:, start : start + block] - mean_M[start : start + block]
        components[:, start : start + block] = (U_smooth.T @ piece) / np.sqrt(values)[:, None]
    return values / count, components


def _randomised(
    map_reduce: MapReduce, mean_M: Floats, rows: int, width: int, iterations: int, seed: int
) -> tuple[Floats, Floats]:
    basis_ML: Floats = np.random.default_rng(seed).standard_normal((len(mean_M), width), dtype=np.float32)
    basis_ML = np.linalg.qr(basis_ML)[0]
    mean32 = mean_M.astype(np.float32)
    for step in range(max(2, iterations)):
        product = map_reduce(functools.partial(Product.of, mean_M=mean32, basis_ML=basis_ML)).sum
        if step < max(2, iterations) - 1:
            basis_ML = np.linalg.qr(product)[0]
    ritz_LL = (basis_ML.T @ product).astype(np.float64) / rows
    values, vectors = np.linalg.eigh((ritz_LL + ritz_LL.T) / 2)
    return values[::-1], (basis_ML @ vectors[:, ::-1].astype(np.float32)).T


def _fix_signs(components_KM: Floats) -> Floats:
    """The entry of largest magnitude is positive: the same components whatever the chunks and the library."""
    largest = np.abs(components_KM).argmax(1)
    return components_KM * np.sign(components_KM[np.arange(len(components_KM)), largest])[:, None]


def ridge_smoother(embeddings_PC: Floats, penalty: float) -> Floats:
    """(P, P) H with `H X` what a ridge regression from the embeddings predicts for its own centred rows X.

    `penalty`: λ, a share of a unit embedding's squared length, as in `baselines.Ridge`.
    """
    e_PC = embeddings_PC.astype(np.float64)
    e_PC = e_PC - e_PC.mean(0)
    ridge_CC = e_PC.T @ e_PC + penalty * len(e_PC) * np.eye(e_PC.shape[1])
    return e_PC @ np.linalg.solve(ridge_CC, e_PC.T)
