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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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


def fit_ridge(pairs: Iterable[tuple[Tensor, Tensor]], penalties: Sequence[float] = PENALTIES) -> list[Ridge]:
    """One regression for each penalty, from one round over embeddings (B, C) and targets (B, M).

    Raises ValueError for fewer than two rows.
    """
    count = 0
    sums: tuple[Tensor, ...] | None = None
    for e_BC, x_BM in pairs:
        e_BC, x_BM = e_BC.double(), x_BM.double()
        new = (e_BC.sum(0), x_BM.sum(0), e_BC.T @ e_BC, e_BC.T @ x_BM)
        sums = new if sums is None else tuple(a + b for a, b in zip(sums, new, strict=True))
        count += len(e_BC)
    if sums is None or count < 2:
        raise ValueError(f"{count} rows were given to the regression; at least two are needed")
    sum_C, sum_M, ee_CC, ex_CM = sums
    mean_C, mean_M = sum_C / count, sum_M / count
    covariance_CC = ee_CC / count - torch.outer(mean_C, mean_C)
    cross_CM = ex_CM / count - torch.outer(mean_C, mean_M)
    values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    rotated_CM = vectors_CC.T @ cross_CM
    return [
        Ridge(
            mean_C.float(),
            mean_M.float(),
            (vectors_CC @ (rotated_CM / (values_C.clamp(min=0) + penalty)[:, None])).float(),
            penalty,
        )
        for penalty in penalties
    ]


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
        found = fit_ridge(train(), penalties)
        scores = [_score(ridge.predict, ridge.target_mean_M, validation) for ridge in found]
        best = int(np.argmax(scores))
        return cls(found[best], scores[best])

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
