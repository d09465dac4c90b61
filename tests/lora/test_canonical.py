"""Laws of the canonical SVD form."""

import time

import pytest
import torch
from torch import Tensor

from lora_diffusion.lora.canonical import canonicalize
from lora_diffusion.lora.layout import LoRALayout

SHAPES = {"down.0.to_q": (12, 20), "down.0.to_v": (7, 5), "up.0.to_q": (16, 16)}


def make_layout(rank: int) -> LoRALayout:
    return LoRALayout.from_shapes(SHAPES, rank=rank, alpha=1.0, target_modules=("to_q", "to_v"))


def random_vectors(layout: LoRALayout, count: int, seed: int) -> Tensor:
    return torch.randn(count, layout.size, generator=torch.Generator().manual_seed(seed))


def updates(vectors_KN: Tensor, layout: LoRALayout) -> Tensor:
    """All products B A, flattened: what the LoRAs do."""
    return torch.cat([(B @ A).flatten(1) for A, B in layout.split(vectors_KN).values()], dim=1)


def refactored(vectors_KN: Tensor, layout: LoRALayout, seed: int) -> Tensor:
    """Other vectors with the same products: A -> M A, B -> B M^-1, with a random M of condition number 10."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, (A, B) in layout.split(vectors_KN).items():
        left, _ = torch.linalg.qr(torch.randn(len(A), layout.rank, layout.rank, generator=generator))
        right, _ = torch.linalg.qr(torch.randn(len(A), layout.rank, layout.rank, generator=generator))
        M = left @ torch.diag(torch.logspace(-0.5, 0.5, layout.rank)) @ right
        matrices[name] = (M @ A, B @ torch.linalg.inv(M))
    return layout.join(matrices)


@pytest.mark.parametrize("rank", [1, 4])
def test_update_stays_and_form_is_idempotent(rank: int) -> None:
    layout = make_layout(rank)
    vectors, reference = random_vectors(layout, 6, 0), random_vectors(layout, 1, 1)[0]
    canonical = canonicalize(vectors, layout, reference)
    assert not torch.allclose(canonical, vectors, atol=0.1)
    torch.testing.assert_close(updates(canonical, layout), updates(vectors, layout), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(canonicalize(canonical, layout, reference), canonical, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_equal_updates_get_equal_vectors(rank: int) -> None:
    layout = make_layout(rank)
    vectors, reference = random_vectors(layout, 6, 0), random_vectors(layout, 1, 1)[0]
    others = refactored(-vectors, layout, 2)
    assert (others - vectors).abs().max() > 1
    torch.testing.assert_close(
        canonicalize(others, layout, reference), canonicalize(vectors, layout, reference), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_components_are_balanced_orthogonal_and_fall(rank: int) -> None:
    layout = make_layout(rank)
    canonical = canonicalize(random_vectors(layout, 3, 0), layout, random_vectors(layout, 1, 1)[0])
    for A, B in layout.split(canonical).values():
        s_KR = A.square().sum(2)
        torch.testing.assert_close(A @ A.transpose(1, 2), torch.diag_embed(s_KR), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B.transpose(1, 2) @ B, torch.diag_embed(s_KR), rtol=1e-4, atol=1e-4)
        assert (s_KR.diff(dim=1) <= 1e-4).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_singular_values_are_those_of_the_full_product(rank: int) -> None:
    layout = make_layout(rank)
    vectors = random_vectors(layout, 2, 3)
    canonical = layout.split(canonicalize(vectors, layout, vectors[0]))
    for name, (A, B) in layout.split(vectors).items():
        expected = torch.linalg.svdvals(B @ A)[:, :rank]
        torch.testing.assert_close(canonical[name][0].square().sum(2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_rows_do_not_depend_on_their_batch(rank: int) -> None:
    layout = make_layout(rank)
    vectors, reference = random_vectors(layout, 5, 0), random_vectors(layout, 1, 1)[0]
    together = canonicalize(vectors, layout, reference)
    alone = torch.cat([canonicalize(row[None], layout, reference) for row in vectors])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def largest_entry_positive(vectors_KN: Tensor, layout: LoRALayout) -> Tensor:
    """The customary sign rule, for rank 1: the entry of A with the largest magnitude is made positive."""
    matrices = {}
    for name, (A, B) in layout.split(vectors_KN).items():
        largest = A.gather(2, A.abs().argmax(dim=2, keepdim=True))
        matrices[name] = (A * largest.sign(), B * largest.sign())
    return layout.join(matrices)


def test_neighbours_stay_neighbours_where_the_largest_entry_rule_tears_them_apart() -> None:
    layout = make_layout(1)
    vector = random_vectors(layout, 1, 0)
    A = layout.split(vector)["down.0.to_q"][0]
    A[0, 0, :2] = torch.tensor([4.0, -4.0])  # A tie between a positive and a negative entry.
    neighbours = vector.repeat(2, 1)
    A_pair = layout.split(neighbours)["down.0.to_q"][0]
    A_pair[0, 0, 0] += 1e-4
    A_pair[1, 0, 1] -= 1e-4
    reference = random_vectors(layout, 1, 1)[0]
    ours = canonicalize(neighbours, layout, reference)
    customary = largest_entry_positive(ours, layout)
    assert (ours[0] - ours[1]).norm() < 1e-3
    assert (customary[0] - customary[1]).norm() > 1.0


@pytest.mark.parametrize("rank", [1, 4])
def test_small_changes_stay_small_around_the_reference(rank: int) -> None:
    layout = make_layout(rank)
    reference = random_vectors(layout, 1, 0)
    noise = random_vectors(layout, 200, 1)
    vectors = reference + 0.05 * noise
    moved = vectors + 1e-4 * random_vectors(layout, 200, 2)
    distance = (canonicalize(moved, layout, reference[0]) - canonicalize(vectors, layout, reference[0])).norm(dim=1)
    assert distance.max() < 100 * 1e-4 * layout.size**0.5


@pytest.mark.parametrize("rank", [1, 4])
def test_canonical_reference_is_its_own_form(rank: int) -> None:
    layout = make_layout(rank)
    reference = canonicalize(random_vectors(layout, 1, 0), layout, random_vectors(layout, 1, 1)[0])
    torch.testing.assert_close(canonicalize(reference, layout, reference[0]), reference, rtol=1e-4, atol=1e-4)


def test_start_of_fine_tuning_serves_as_reference() -> None:
    """B = 0 at the start: the sign then comes from A alone, and vectors that share their A keep it."""
    layout = make_layout(1)
    vectors, start = random_vectors(layout, 8, 0), random_vectors(layout, 1, 1)[0]
    is_B = layout.mask_B()
    start[is_B] = 0
    vectors[:, ~is_B] = start[~is_B]
    canonical = canonicalize(vectors, layout, start)
    for name, (A, _) in layout.split(canonical).items():
        assert (torch.cosine_similarity(A[:, 0], layout.split(start[None])[name][0][:, 0]) > 0.9999).all()


def test_reference_without_B_decides_by_its_A_alone() -> None:
    layout = make_layout(4)
    vectors, start = random_vectors(layout, 50, 0), random_vectors(layout, 1, 1)
    matrices = layout.split(start)
    rows = {name: torch.linalg.qr(A.transpose(1, 2))[0].transpose(1, 2) for name, (A, _) in matrices.items()}
    start = layout.join({name: (rows[name], torch.zeros_like(B)) for name, (_, B) in matrices.items()})
    for name, (A, _) in layout.split(canonicalize(vectors, layout, start[0])).items():
        assert ((A * rows[name]).sum(2) >= 0).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_zero_updates_become_zero_not_nan(rank: int) -> None:
    layout = make_layout(rank)
    vectors = random_vectors(layout, 2, 0)
    vectors[:, layout.mask_B()] = 0
    vectors[1] = 0
    assert canonicalize(vectors, layout, vectors[0]).abs().max() == 0


def test_misuse_is_explained() -> None:
    layout = make_layout(1)
    vectors = random_vectors(layout, 2, 0)
    with pytest.raises(ValueError, match=r"expects \(K, 76\)"):
        canonicalize(vectors[:, 1:], layout, vectors[0])
    with pytest.raises(ValueError, match="mean of the corpus"):
        canonicalize(vectors, layout, vectors)
    with pytest.raises(ValueError, match="NaN or infinity"):
        canonicalize(vectors.index_fill(1, torch.tensor([3]), torch.nan), layout, vectors[0])


def test_sd15_vectors_need_no_large_matrices() -> None:
    """N = 99,648: only the factors are decomposed, never the 64 products of up to 1280 x 1280."""
    shapes: dict[str, tuple[int, int]] = {}
    for block, width in enumerate([320] * 5 + [640] * 5 + [1280] * 6):
        shapes |= {f"{block}.attn1.to_q": (width, width), f"{block}.attn1.to_v": (width, width)}
        shapes |= {f"{block}.attn2.to_q": (width, width), f"{block}.attn2.to_v": (768, width)}
    layout = LoRALayout.from_shapes(shapes, rank=1, alpha=27.0, target_modules=("to_q", "to_v"))
    assert layout.size == 99_648
    vectors = random_vectors(layout, 16, 0)
    start = time.perf_counter()
    canonicalize(vectors, layout, vectors[0])
    assert (time.perf_counter() - start) / len(vectors) < 0.2  # 0.006 s on one busy core.
