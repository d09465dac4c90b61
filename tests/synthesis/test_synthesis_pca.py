"""Principal components: those of the SVD, however the rows are cut and whoever adds them up."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from lora_diffusion.synthesis.pca import PCA, MapReduce, fit_pca, fit_pca_distributed, ridge_smoother

PATHS = {  # every way of fitting, on the same small rows
    "rows": {"exact_rows": 1000},
    "columns": {"exact_rows": 1, "exact_columns": 1000},
    "randomised": {"exact_rows": 1, "exact_columns": 1},
}


def rows(count: int = 80, columns: int = 50, seed: int = 0) -> np.ndarray:
    """Directions of falling variance, off centre."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((columns, columns)))[0] * (0.8 ** np.arange(columns))[:, None]
    return (rng.standard_normal((count, columns)) @ mixing + 3 * rng.standard_normal(columns)).astype(np.float32)


def svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """numpy's: variances of the population and components."""
    x = x.astype(np.float64)
    _, s, components = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return s**2 / len(x), components


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(80, 50), (40, 90)])
def test_pca_equals_svd(path: str, shape: tuple[int, int]) -> None:
    x = rows(*shape)
    pca = fit_pca(lambda: [x], 10, **PATHS[path])
    variances, components = svd(x)
    np.testing.assert_allclose(pca.explained_variance_K, variances[:10], rtol=1e-4)
    np.testing.assert_allclose(np.abs((pca.components_KM.numpy() * components[:10]).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(float(pca.total_variance), variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(pca.mean_M, x.mean(0), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_chunks_equal_the_whole(path: str) -> None:
    x = rows()
    whole = fit_pca(lambda: [x], 8, **PATHS[path])
    chunked = fit_pca(lambda: iter([x[:7], x[7:7], x[7:50], x[50:]]), 8, **PATHS[path])
    for a, b in zip(whole.buffers(), chunked.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("path", PATHS)
def test_sums_merged_in_a_tree_equal_the_whole(path: str) -> None:
    """As many machines would: each adds up its own chunks, then the sums are added up pairwise."""
    x = rows()
    machines = [np.array_split(part, 3) for part in np.array_split(x, 4)]

    def map_reduce(function):  # type: ignore[no-untyped-def]
        sums = [functools.reduce(lambda a, b: a.merge(b), map(function, chunks)) for chunks in machines]
        return sums[0].merge(sums[1]).merge(sums[2].merge(sums[3]))

    tree: MapReduce = map_reduce
    merged = fit_pca_distributed(tree, 8, **PATHS[path])
    for a, b in zip(fit_pca(lambda: [x], 8, **PATHS[path]).buffers(), merged.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("path", PATHS)
def test_all_components_bring_everything_back(path: str) -> None:
    x = torch.from_numpy(rows(30, 12))
    pca = fit_pca(lambda: [x.numpy()], 12, **PATHS[path])
    torch.testing.assert_close(pca.decode(pca.encode(x)), x, rtol=0, atol=1e-4)
    assert pca.curve()[-1] == pytest.approx(1, abs=1e-5)


def test_the_curve_rises_and_each_component_adds_less() -> None:
    curve = np.array(fit_pca(lambda: [rows()], 30).curve())
    gains = np.diff(curve, prepend=0)
    assert (gains > 0).all()
    assert (np.diff(gains) <= 1e-6).all()
    assert curve[-1] <= 1 + 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_no_component_is_invented_beyond_the_rank(path: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 3)) @ rng.standard_normal((3, 40))).astype(np.float32)
    assert len(fit_pca(lambda: [x], 20, **{**PATHS[path], "seed": 1})) == 3


def test_the_variance_along_a_component_is_the_one_it_states() -> None:
    """Also in the randomised fit, whose components need not be the best ones."""
    x = rows(200, 60)
    pca = fit_pca(lambda: [x], 12, **PATHS["randomised"], oversampling=2, iterations=2)
    coefficients = pca.encode(torch.from_numpy(x))
    torch.testing.assert_close(coefficients.var(0, correction=0), pca.explained_variance_K, rtol=1e-3, atol=1e-5)


def test_truncated_keeps_the_first_components() -> None:
    pca = fit_pca(lambda: [rows()], 9)
    short = pca.truncated(4)
    assert torch.equal(short.components_KM, pca.components_KM[:4])
    assert short.curve() == pca.curve()[:4]
    with pytest.raises(ValueError, match="has 9"):
        pca.truncated(10)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "no rows"),
        ([np.zeros((0, 4), np.float32)], "no rows"),
        ([np.ones((1, 4), np.float32)], "at least two"),
        ([np.full((3, 4), np.nan, np.float32)], "NaN"),
        ([np.ones((5, 4), np.float32)], "do not vary"),
        ([np.ones((2, 4), np.float32), np.ones((2, 5), np.float32)], "do not merge"),
    ],
)
def test_rows_without_components_are_named(chunks: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pca(lambda: chunks, 3)


def test_a_pca_survives_its_state_dict() -> None:
    pca = fit_pca(lambda: [rows()], 5)
    again = PCA(*(torch.zeros_like(b) for b in pca.buffers()))
    again.load_state_dict(pca.state_dict())
    x = torch.from_numpy(rows(seed=3))
    assert torch.equal(again.encode(x), pca.encode(x))


def test_components_of_what_the_embedding_predicts() -> None:
    """A faint signal under loud noise: the plain PCA finds the noise, the reduced-rank regression the signal."""
    rng = np.random.default_rng(0)
    embeddings, directions = rng.standard_normal((200, 6)), np.linalg.qr(rng.standard_normal((80, 2)))[0].T
    signal = embeddings[:, :2] @ directions
    x = (signal + 2 * rng.standard_normal((200, 80)) @ np.diag(np.linspace(0, 1, 80))).astype(np.float32)
    H = ridge_smoother(embeddings, 1e-2)
    centred = x - x.mean(0)
    _, s, Vt = np.linalg.svd(H @ centred, full_matrices=False)
    pca = fit_pca(lambda: [x[:90], x[90:]], 2, smoother_PP=H)
    assert np.allclose(pca.explained_variance_K, s[:2] ** 2 / 200, rtol=1e-4)
    assert np.allclose(np.abs((pca.components_KM.numpy() * Vt[:2]).sum(1)), 1, atol=1e-4)
    plain = fit_pca(lambda: [x], 2)

    def kept(found: PCA) -> float:
        return float(np.square(directions @ found.components_KM.numpy().T).sum() / 2)

    assert kept(pca) > 0.6 > 0.1 > kept(plain)


def test_a_smoother_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smoother is \(3, 3\) for 20 rows"):
        fit_pca(lambda: [rows()[:20]], 2, smoother_PP=np.eye(3))
    with pytest.raises(ValueError, match="at most 10 rows"):
        fit_pca(lambda: [rows()[:20]], 2, exact_rows=10, smoother_PP=np.eye(20))
