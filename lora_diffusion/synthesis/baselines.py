"""What a synthesiser must beat: the nearest person of the corpus, and linear regression from the embedding.

Ridge regression with an intercept, x̂ = mean + (e - mean_e) W, W = (EᵀE + λ P I)⁻¹ EᵀX, from sums over chunks of the
corpus: memory is (C, C) and (C, M), whatever the number of rows. It predicts the vector itself, or the coefficients of
the first principal components of the normalised vectors.

λ (and the number of components) is chosen on rows that were not fitted, by the cosine between predicted and true
deviation from the mean: squared error would choose a LoRA near the mean for everybody, and how far to go from the mean is
a setting of its own (`deviation_scale`).

Axes: P rows, B batch, C embedding, N vector length, M normalised, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.synthesis.codes import CodeSpace, PCACodes
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA, fit_pca

Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # embeddings (B, C) and vectors (B, N), a new round at each call
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Ridge:
    """`predict`: embeddings (B, C) -> targets (B, M). `penalty`: λ, a share of a unit embedding's squared length."""

    embedding_mean_C: Tensor
    target_mean_M: Tensor
    weight_CM: Tensor
    penalty: float

    def predict(self, embeddings_BC: Tensor) -> Tensor:
        return self.target_mean_M + (embeddings_BC - self.embedding_mean_C) @ self.weight_CM


def fit_ridge(pairs: Iterable[tuple[Tensor, Tensor]], penalties: Sequence[float] = PENALTIES) -> Iterator[Ridge]:
    """One regression for each penalty, from one round over embeddings (B, C) and targets (B, M).

    Each is made when it is asked for, so that few lie in memory: 4 bytes × C × M each. Raises ValueError for fewer than two rows.
    """
    count = 0
    for e_BC, x_BM in pairs:
        e_BC, x_BM = e_BC.double(), x_BM.double()
        if not count:
            sums = [e_BC.new_zeros(shape) for shape in [e_BC.shape[1:], x_BM.shape[1:]]]
            products = [e_BC.new_zeros(e_BC.shape[1], width) for width in (e_BC.shape[1], x_BM.shape[1])]
        for total, product, rows in zip(sums, products, (e_BC, x_BM), strict=True):
            total += rows.sum(0)
            product.addmm_(e_BC.T, rows)
        count += len(e_BC)
    if count < 2:
        raise ValueError(f"{count} rows were given to the regression; at least two are needed")
    mean_C, mean_M = (total / count for total in sums)
    covariance_CC, cross_CM = (product.div_(count) for product in products)
    covariance_CC.addr_(mean_C, mean_C, alpha=-1)
    cross_CM.addr_(mean_C, mean_M, alpha=-1)
    values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    rotated_CM = _product(vectors_CC.T, cross_CM, cross_CM)
    for penalty in penalties:
        shrunken_CC = vectors_CC / (values_C.clamp(min=0) + penalty)
        weight_CM = _product(shrunken_CC, rotated_CM, torch.empty(rotated_CM.shape))
        yield Ridge(mean_C.float(), mean_M.float(), weight_CM, penalty)


def _product(a_CC: Tensor, b_CM: Tensor, out_CM: Tensor) -> Tensor:
    """a b, written into `out_CM` some columns at a time: nothing of its size lies beside it. `out_CM` may be `b_CM`."""
    for start in range(0, b_CM.shape[1], 4096):
        part = slice(start, start + 4096)
        out_CM[:, part] = a_CC @ b_CM[:, part]
    return out_CM


def deviation_cosine(predicted_BN: Tensor, true_BN: Tensor, mean_N: Tensor) -> float:
    """Mean cosine of the deviations from the corpus' mean: 0 for a constant prediction."""
    a_BN, b_BN = (predicted_BN - mean_N).double(), (true_BN - mean_N).double()
    return float(F.cosine_similarity(a_BN, b_BN, dim=1, eps=1e-12).mean())


@dataclass(frozen=True, eq=False)
class RidgeToVector:
    """Embedding -> LoRA vector. `cosine`: of predicted and true deviations, on the rows that chose the penalty."""

    ridge: Ridge
    cosine: float

    @classmethod
    def fit(cls, train: Pairs, validation: Pairs, penalties: Sequence[float] = PENALTIES) -> RidgeToVector:
        best: RidgeToVector | None = None
        for ridge in fit_ridge(train(), penalties):
            cosine = _score(ridge.predict, ridge.target_mean_M, validation)
            if best is None or cosine > best.cosine:
                best = cls(ridge, cosine)
        assert best is not None
        return best

    def predict(self, embeddings_BC: Tensor) -> Tensor:
        return self.ridge.predict(embeddings_BC)


@dataclass(frozen=True, eq=False)
class RidgeToPCA:
    """Embedding -> coefficients of the first `components` principal components -> LoRA vector."""

    ridge: Ridge
    space: CodeSpace
    cosine: float

    @property
    def components(self) -> int:
        return self.space.size

    @classmethod
    def fit(
        cls,
        train: Pairs,
        validation: Pairs,
        normaliser: Normaliser,
        pca: PCA,
        components: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
        penalties: Sequence[float] = PENALTIES,
    ) -> RidgeToPCA:
        """`pca`: of the normalised training vectors; of `components` those are tried that it has, and all it has."""
        best: RidgeToPCA | None = None
        for count in sorted({min(count, len(pca)) for count in components}):
            space = PCACodes(normaliser, pca.truncated(count))
            codes = ((e_BC, space.encode(v_BN)) for e_BC, v_BN in train())
            for ridge in fit_ridge(codes, penalties):
                found = cls(ridge, space, 0.0)
                cosine = _score(found.predict, normaliser.mean_N, validation)
                if best is None or cosine > best.cosine:
                    best = cls(ridge, space, cosine)
        assert best is not None
        return best

    def predict(self, embeddings_BC: Tensor) -> Tensor:
        return self.space.decode(self.ridge.predict(embeddings_BC))


def nearest_rows(embeddings_BC: Tensor, corpus_PC: Tensor) -> Tensor:
    """(B,) which row of the corpus has the embedding of highest cosine."""
    return (F.normalize(embeddings_BC, dim=1) @ F.normalize(corpus_PC, dim=1).T).argmax(1)


def principal_components(normaliser: Normaliser, vectors: Callable[[], Iterable[Tensor]], count: int) -> PCA:
    """PCA of the normalised vectors, chunks (B, N)."""
    return fit_pca(lambda: (normaliser.normalise(chunk).numpy() for chunk in vectors()), count)


def _score(predict: Callable[[Tensor], Tensor], mean_N: Tensor, validation: Pairs) -> float:
    parts = [(deviation_cosine(predict(e_BC), v_BN, mean_N), len(e_BC)) for e_BC, v_BN in validation() if len(e_BC)]
    return sum(cosine * rows for cosine, rows in parts) / max(1, sum(rows for _, rows in parts))
