"""Normaliser and code spaces: what goes in comes back, constants exactly, codes at unit variance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthesis_world import CONSTANT, LAYOUT, space_of, toy

from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.synthesis.codes import LearnedCodes, VectorCodes, build_codes, reconstruction
from lora_diffusion.synthesis.normaliser import Normaliser

KINDS = ["latent", "pca", "vector"]


def test_constants_are_restored_bit_for_bit() -> None:
    """Also those whose mean float64 does not sum up exactly, and after merging."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((777, 40)).astype(np.float32)
    vectors[:, 1::2] = rng.standard_normal(20).astype(np.float32) * 10.0 ** rng.integers(-6, 3, 20)
    statistics = Statistics.merged((Statistics.of(part) for part in np.array_split(vectors, 13)), 40)
    normaliser = Normaliser.from_statistics(statistics)
    assert normaliser.varying.tolist() == list(range(0, 40, 2))
    restored = normaliser.restore(torch.randn(5, normaliser.size))
    assert np.array_equal(restored[:, 1::2].numpy(), vectors[:5, 1::2])


def test_normalised_parameters_have_mean_0_and_variance_1_and_come_back() -> None:
    data = toy()
    x_PM = data.normaliser.normalise(data.vectors_PN)
    assert x_PM.shape == (120, LAYOUT.size - CONSTANT)
    assert float(x_PM.mean(0).abs().max()) < 1e-5
    torch.testing.assert_close(x_PM.var(0, correction=0), torch.ones(x_PM.shape[1]), rtol=1e-4, atol=0)
    torch.testing.assert_close(data.normaliser.restore(x_PM), data.vectors_PN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(4), torch.zeros(4), "varies"),
        (torch.zeros(4), torch.ones(5), "must be"),
        (torch.full((4,), torch.nan), torch.ones(4), "NaN"),
    ],
)
def test_statistics_that_normalise_nothing_are_refused(mean: torch.Tensor, std: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normaliser(mean, std)


def test_one_person_is_no_corpus() -> None:
    with pytest.raises(ValueError, match="at least two"):
        Normaliser.from_statistics(Statistics.of(np.ones((1, 4))))


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=f"expected \\(B, {LAYOUT.size}\\)"):
        toy().normaliser.normalise(torch.zeros(2, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_have_mean_0_and_variance_1_over_the_corpus(kind: str) -> None:
    data = toy()
    codes_PZ = space_of(kind, data).encode(data.vectors_PN)
    assert float(codes_PZ.mean(0).abs().max()) < 1e-3
    used = codes_PZ.var(0, correction=0)
    assert float(used.max()) < 1.001
    assert float(used[:4].min()) > 0.999  # the four traits


def test_together_keeps_the_proportions_and_the_mean_square() -> None:
    data = toy()
    space = space_of("pca", data)
    space.standardise([data.vectors_PN], scale="together")
    variance_Z = space.encode(data.vectors_PN).var(0, correction=0)
    torch.testing.assert_close(variance_Z.mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    explained = space.pca.explained_variance_K  # type: ignore[union-attr]
    torch.testing.assert_close(variance_Z / variance_Z[0], explained / explained[0], rtol=1e-3, atol=1e-5)


def test_a_number_that_hardly_varies_is_not_blown_up() -> None:
    data = toy(noise=1e-4)
    variance_Z = space_of("pca", data).encode(data.vectors_PN).var(0, correction=0)
    assert (variance_Z[4:] < 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_undoes_encode_up_to_what_the_space_leaves_out(kind: str) -> None:
    data = toy()
    kept = reconstruction(space_of(kind, data), data.vectors_PN.split(50))
    assert kept.rows == 120
    assert kept.r2 > 0.98
    if kind == "vector":
        assert kept.r2 == pytest.approx(1)
    else:
        assert kept.relative_error == pytest.approx((1 - kept.r2) ** 0.5, rel=0.5)


@pytest.mark.parametrize("kind", [*KINDS, "learned"])
@pytest.mark.parametrize("scattered", [False, True])
def test_many_vectors_at_once_are_those_of_one_at_a_time(kind: str, scattered: bool) -> None:
    """In arrays of their own; constants bit for bit; also where no neighbours vary together."""
    data = toy()
    space = LearnedCodes.of(space_of("pca", data), 3) if kind == "learned" else space_of(kind, data)
    assert space.normaliser.blocks
    if scattered:
        space.normaliser.blocks = None
    codes_BZ = space.encode(data.vectors_PN[:64])
    together, alone = space.decode_array(codes_BZ, 1.5), space.decode(codes_BZ, 1.5)
    torch.testing.assert_close(torch.from_numpy(together), alone, rtol=1e-5, atol=1e-5)
    constant = torch.ones(LAYOUT.size, dtype=torch.bool)
    constant[space.normaliser.varying] = False
    assert torch.equal(torch.from_numpy(together)[:, constant], alone[:, constant])
    again = space.decode_array(codes_BZ, 1.5)
    assert not np.shares_memory(together, again)
    assert together.flags.writeable
    assert together.flags.c_contiguous


def test_neighbours_that_vary_make_a_block() -> None:
    varies = torch.ones(9000)
    varies[100:300] = 0
    blocks = Normaliser(torch.zeros(9000), varies).blocks
    assert blocks is not None
    assert [(a.start, a.stop, b.start, b.stop) for a, b in blocks] == [
        (0, 100, 0, 100),
        (300, 4396, 100, 4196),
        (4396, 8492, 4196, 8292),
        (8492, 9000, 8292, 8800),
    ]
    assert Normaliser(torch.zeros(9000), torch.arange(9000) % 2).blocks is None


def test_r2_of_the_mean_is_0() -> None:
    data = toy()
    space = space_of("pca", data)
    space.scale_Z.fill_(1e12)  # every code becomes 0
    space.shift_Z.zero_()
    space.raw_decode = lambda raw: torch.zeros(len(raw), space.normaliser.size)  # type: ignore[method-assign]
    kept = reconstruction(space, [data.vectors_PN])
    assert kept.r2 == pytest.approx(0, abs=1e-6)
    assert kept.relative_error == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_space_survives_its_description_and_tensors(kind: str) -> None:
    data = toy()
    space = space_of(kind, data)
    again = build_codes(space.describe(), space.state_dict())
    codes_PZ = space.encode(data.vectors_PN)
    assert torch.equal(again.encode(data.vectors_PN), codes_PZ)
    assert torch.equal(again.decode(codes_PZ), space.decode(codes_PZ))


def test_tensors_that_do_not_fit_are_refused() -> None:
    space = space_of("latent", toy())
    description = {**space.describe(), "vae": {**space.describe()["vae"], "latent_size": 7}}
    with pytest.raises(ValueError, match="do not make a latent code space"):
        build_codes(description, space.state_dict())
    with pytest.raises(ValueError, match="unknown code space"):
        build_codes({"kind": "magic"}, space.state_dict())


def test_codes_of_another_space_are_refused() -> None:
    space = space_of("pca", toy())
    with pytest.raises(ValueError, match=r"expects \(B, 6\)"):
        space.decode(torch.zeros(2, 5))


def test_a_corpus_of_copies_has_no_codes() -> None:
    data = toy()
    space = VectorCodes(data.normaliser)
    with pytest.raises(ValueError, match="same code"):
        space.standardise([data.vectors_PN[:1].repeat(9, 1)])
    with pytest.raises(ValueError, match="at least two"):
        space.standardise([data.vectors_PN[:1]])


def test_a_parameter_varies_where_float32_can_tell() -> None:
    """A ten-millionth of its mean: more would hold still what the corpus' people differ by."""
    mean_N, std_N = torch.tensor([1.0, 1.0, 0.0, 0.0, 100.0]), torch.tensor([1e-6, 5e-8, 1e-10, 0.0, 1e-6])
    assert Normaliser(mean_N, std_N).varying.tolist() == [0, 2]
