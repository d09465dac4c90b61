"""The denoiser: two ways to condition, fairly compared; the face that is hidden; rows that do not meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_diffusion.synthesis.denoiser import (
    ADALoRALinear,
    Denoiser,
    DenoiserConfig,
    count_parameters,
    with_equal_parameters,
)

CONDITIONINGS = ["adanorm", "adalora"]
SMALL = DenoiserConfig(width=24, depth=2, condition_width=16, rank=2, generator_width=6)


def denoiser(conditioning: str, awake: bool = True, code_size: int = 10) -> Denoiser:
    """`awake`: with weights that are zero at the start of training at random as well."""
    torch.manual_seed(0)
    network = Denoiser(code_size, 512, replace(SMALL, conditioning=conditioning))  # type: ignore[arg-type]
    if awake:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def inputs(batch: int = 5, code_size: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    condition = torch.nn.functional.normalize(torch.randn(batch, 512, generator=g), dim=1)
    return torch.randn(batch, code_size, generator=g), torch.randint(0, 1000, (batch,), generator=g), condition


@pytest.mark.parametrize("code_size", [64, 512, 5_600, 99_648])
@pytest.mark.parametrize("width", [256, 512, 1024])
def test_adalora_and_adanorm_can_be_given_equal_parameters(width: int, code_size: int) -> None:
    adanorm = DenoiserConfig(conditioning="adanorm", width=width)
    adalora = with_equal_parameters(adanorm, code_size)
    ours, theirs = (count_parameters(config, code_size) for config in (adalora, adanorm))
    assert abs(ours / theirs - 1) <= 0.01
    chosen = {"conditioning": "adanorm", "rank": adanorm.rank, "generator_width": adanorm.generator_width}
    assert replace(adalora, **chosen) == adanorm  # nothing else differs


def test_counted_parameters_are_those_of_the_network() -> None:
    for conditioning in CONDITIONINGS:
        network = denoiser(conditioning)
        assert count_parameters(network.config, 10) == sum(p.numel() for p in network.parameters())


def test_equal_parameters_need_an_adanorm_to_equal() -> None:
    with pytest.raises(ValueError, match="conditioning adanorm"):
        with_equal_parameters(SMALL, 10)


def test_adalora_changes_the_weights_of_each_row_by_its_own_low_rank_matrix() -> None:
    """y = W x + b + B(u) A(u) x, written out row by row with whole matrices."""
    torch.manual_seed(0)
    layer = ADALoRALinear(7, 5, rank=2, generator_width=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_BI, u_BU = torch.randn(4, 7), torch.randn(4, 3)
    y_BO = layer(x_BI, u_BU)
    for x, u, y in zip(x_BI, u_BU, y_BO, strict=True):
        A_RI = (layer.make_A.weight @ u + layer.make_A.bias).view(2, 7)
        B_OR = (layer.make_B.weight @ u + layer.make_B.bias).view(2, 5).T
        torch.testing.assert_close(y, (layer.linear.weight + B_OR @ A_RI) @ x + layer.linear.bias)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_training_starts_from_silence_and_reaches_every_weight(conditioning: str) -> None:
    network = denoiser(conditioning, awake=False)
    noisy, timesteps, condition = inputs()
    drop_B = torch.tensor([False, True, False, True, False])
    assert not network(noisy, timesteps, condition, drop_B).any()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(5):
        optimizer.zero_grad()
        (network(noisy, timesteps, condition, drop_B) - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_row_does_not_depend_on_its_company(conditioning: str) -> None:
    """To float error: matrix products of other sizes round differently."""
    network = denoiser(conditioning)
    noisy, timesteps, condition = inputs()
    together = network(noisy, timesteps, condition)
    alone = torch.cat([network(noisy[i : i + 1], timesteps[i : i + 1], condition[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_hidden_face_is_no_face(conditioning: str) -> None:
    network = denoiser(conditioning)
    noisy, timesteps, condition = inputs()
    shown = network(noisy, timesteps, condition, torch.zeros(5, dtype=torch.bool))
    hidden = network(noisy, timesteps, condition, torch.ones(5, dtype=torch.bool))
    assert torch.equal(shown, network(noisy, timesteps, condition))
    assert torch.equal(hidden, network(noisy, timesteps, None))
    assert torch.equal(hidden, network(noisy, timesteps, condition.roll(1, 0), torch.ones(5, dtype=torch.bool)))
    assert not torch.isclose(shown, hidden).all(1).any()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_face_and_the_time_both_tell(conditioning: str) -> None:
    network = denoiser(conditioning)
    noisy, timesteps, condition = inputs()
    answer = network(noisy, timesteps, condition)
    assert not torch.isclose(answer, network(noisy, timesteps, condition.roll(1, 0))).all(1).any()
    assert not torch.isclose(answer, network(noisy, 999 - timesteps, condition)).all(1).any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((3, 9), (3, 512)), r"expects \(B, 10\)"), (((3, 10), (3, 128)), "512"), (((3, 10), (2, 512)), "one embedding")],
)
def test_other_sizes_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser("adanorm")(torch.zeros(shapes[0]), torch.zeros(3, dtype=torch.long), torch.zeros(shapes[1]))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_face_comes_in_at_unit_variance(conditioning: str) -> None:
    """A network that was trained so answers otherwise, and worse, to any other scale."""
    network, seen = denoiser(conditioning), list[torch.Tensor]()
    network.embed_face.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    noisy, timesteps, condition = inputs()
    network(noisy, timesteps, torch.nn.functional.normalize(condition, dim=1))
    torch.testing.assert_close(seen[0].square().mean(1), torch.ones(len(noisy)))
