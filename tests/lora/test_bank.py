"""The bank must be exact (K together = one at a time = peft) and leave no trace."""

import copy
from collections.abc import Iterator

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_unet import SMALLEST, TINY, tiny_unet
from torch import Tensor, nn

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "time_emb_proj"),  # linear
    *("conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv", "conv_out"),  # convolutions: 3 x 3, 1 x 1, stride 2
)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def layout(unet: UNet2DConditionModel) -> LoRALayout:
    return LoRALayout.from_unet(unet, rank=2, target_modules=TARGETS, alpha=3)


def random_vectors(layout: LoRALayout, K: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(K, layout.size, generator=torch.Generator().manual_seed(seed))


def random_batch(B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B)
    sample = torch.randn(B, 4, 8, 8, generator=generator)
    text = torch.randn(B, 5, 32, generator=generator)
    return sample.to(dtype), torch.randint(0, 1000, (B,), generator=generator), text.to(dtype)


def run(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return unet(*batch, return_dict=False)[0]


def peft_run(
    unet: UNet2DConditionModel, layout: LoRALayout, vector_N: Tensor, batch: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The independent reference: one adapter of the peft library, weights copied by name. Output and gradient (N,)."""
    config = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=list(layout.target_modules))
    model = peft.inject_adapter_in_model(config, copy.deepcopy(unet))
    layers = {entry.name: model.get_submodule(entry.name) for entry in layout.entries}
    for name, (A_KRI, B_KOR) in layout.split(vector_N[None]).items():
        for part, matrix in ((layers[name].lora_A, A_KRI[0]), (layers[name].lora_B, B_KOR[0])):
            part["default"].weight.data = matrix.reshape_as(part["default"].weight).clone()
    output = run(model, batch)
    output.square().sum().backward()
    gradients = [
        layer[part]["default"].weight.grad.flatten()
        for layer in ({"A": layer.lora_A, "B": layer.lora_B} for layer in layers.values())
        for part in "AB"
    ]
    return output.detach(), torch.cat(gradients)


@pytest.mark.parametrize("rank", [1, 4])
def test_bank_equals_peft_one_at_a_time(unet: UNet2DConditionModel, rank: int) -> None:
    layout = LoRALayout.from_unet(unet, rank=rank, target_modules=TARGETS, alpha=3)
    vectors_KN, batch = random_vectors(layout, 3).requires_grad_(), random_batch(6)
    with LoRABank(unet, layout).active(vectors_KN, 2):
        together = run(unet, batch)
        together.square().sum().backward()
    assert vectors_KN.grad is not None
    for k in range(3):
        rows = slice(2 * k, 2 * k + 2)
        alone, gradient_N = peft_run(unet, layout, vectors_KN[k].detach(), tuple(t[rows] for t in batch))
        assert (together[rows] - alone).abs().max() < 1e-5
        for entry in layout.entries:  # module by module, so that no large gradient hides a small wrong one
            for start, length in (
                (entry.offset_A, rank * entry.in_features),
                (entry.offset_B, rank * entry.out_features),
            ):
                found, expected = (g[start : start + length] for g in (vectors_KN.grad[k], gradient_N))
                assert (found - expected).norm() < 1e-4 * expected.norm(), entry.name
    assert (run(unet, batch) - together).abs().max() > 1e-2  # the update is no rounding error


def test_mixed_counts_equal_one_at_a_time(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    vectors_KN, batch, bank = random_vectors(layout, 4), random_batch(6), LoRABank(unet, layout)
    with torch.no_grad():
        with bank.active(vectors_KN, [2, 0, 1, 3]):
            together = run(unet, batch)
        for k, rows in ((0, slice(0, 2)), (2, slice(2, 3)), (3, slice(3, 6))):
            with bank.active(vectors_KN[k : k + 1], rows.stop - rows.start):
                alone = run(unet, tuple(t[rows] for t in batch))
            assert (together[rows] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("counts", [2, [1, 2, 3]])
def test_gradient_of_each_identity_is_its_gradient_alone(
    unet: UNet2DConditionModel, layout: LoRALayout, counts: int | list[int]
) -> None:
    counts_K = [counts] * 3 if isinstance(counts, int) else counts
    vectors_KN, batch, bank = random_vectors(layout, 3), random_batch(6), LoRABank(unet, layout)

    def gradient(vectors_KN: Tensor, counts: int | list[int], rows: slice) -> Tensor:
        vectors_KN = vectors_KN.clone().requires_grad_()
        with bank.active(vectors_KN, counts):
            run(unet, tuple(t[rows] for t in batch)).square().sum().backward()
        assert vectors_KN.grad is not None
        return vectors_KN.grad

    together, start = gradient(vectors_KN, counts, slice(0, 6)), 0
    for k, n in enumerate(counts_K):
        alone = gradient(vectors_KN[k : k + 1], n, slice(start, start + n))[0]
        assert (together[k] - alone).abs().max() < 1e-4 * alone.abs().max()
        start += n


def test_without_training_A_its_gradient_is_zero_and_that_of_B_the_same(
    unet: UNet2DConditionModel, layout: LoRALayout
) -> None:
    gradients, is_B = [], layout.mask_B()
    for train_A in (True, False):
        vectors_KN = random_vectors(layout, 2).requires_grad_()
        with LoRABank(unet, layout).active(vectors_KN, 1, train_A=train_A):
            run(unet, random_batch(2)).square().sum().backward()
        gradients.append(vectors_KN.grad)
    assert torch.equal(gradients[0][:, is_B], gradients[1][:, is_B])
    assert gradients[0][:, ~is_B].any()
    assert not gradients[1][:, ~is_B].any()


def test_zero_vector_is_the_base_model(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    batch = random_batch(2)
    with torch.no_grad(), LoRABank(unet, layout).active(torch.zeros(2, layout.size)):
        assert torch.equal(run(unet, batch), run(copy.deepcopy(unet), batch))


def test_guidance_batch_is_every_identity_twice(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    vectors_KN, bank = random_vectors(layout, 2), LoRABank(unet, layout)
    batch = random_batch(2)
    with torch.no_grad():
        with bank.active(vectors_KN):
            once = run(unet, batch)
        with bank.active(torch.cat([vectors_KN, vectors_KN])):
            twice = run(unet, tuple(torch.cat([t, t]) for t in batch))
    assert (twice - torch.cat([once, once])).abs().max() < 1e-5


def traces(unet: nn.Module) -> list[object]:
    hooks = [
        (name, key, tuple(value))
        for name, module in unet.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks") or "_hooks_" in key
    ]
    types = [(name, type(module), id(module), sorted(vars(module))) for name, module in unet.named_modules()]
    tensors = [(name, id(p), p._version, p.requires_grad) for name, p in unet.named_parameters()]
    return [hooks, types, tensors, list(unet.state_dict())]


def test_bank_leaves_no_trace(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    before = traces(unet)
    batch = random_batch(1)
    vectors_KN = random_vectors(layout, 1).requires_grad_()
    with LoRABank(unet, layout).active(vectors_KN):
        assert traces(unet) != before
        run(unet, batch).sum().backward()
    assert traces(unet) == before


def test_bank_leaves_no_trace_after_an_error_inside(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    before, bank = traces(unet), LoRABank(unet, layout)
    with pytest.raises(KeyError, match="mine"), bank.active(random_vectors(layout, 1)):
        raise KeyError("mine")
    with (
        pytest.raises(ValueError, match=r"batch of 3.*active for 4 samples"),
        bank.active(random_vectors(layout, 2), 2),
    ):
        run(unet, random_batch(3))
    assert traces(unet) == before
    with torch.no_grad(), bank.active(random_vectors(layout, 1)):  # and the bank is free again
        run(unet, random_batch(1))


@pytest.fixture
def checkpointed(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    model = copy.deepcopy(unet).train()  # diffusers recomputes in training mode only; the model has no dropout
    model.enable_gradient_checkpointing()
    return model


def test_gradient_checkpointing_changes_nothing(
    unet: UNet2DConditionModel, checkpointed: UNet2DConditionModel, layout: LoRALayout
) -> None:
    gradients = []
    for model in (unet, checkpointed):
        vectors_KN = random_vectors(layout, 2).requires_grad_()
        with LoRABank(model, layout).active(vectors_KN, 2):
            run(model, random_batch(4)).square().sum().backward()
        gradients.append(vectors_KN.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("mode", ["autocast", "bfloat16 weights"])
def test_half_precision_is_close_and_gradients_stay_float32(
    unet: UNet2DConditionModel, layout: LoRALayout, mode: str
) -> None:
    batch = random_batch(4)
    results = {}
    for name in ("float32", mode):
        vectors_KN = random_vectors(layout, 2).requires_grad_()
        model, dtype = unet, torch.float32
        if name == "bfloat16 weights":
            model, dtype = copy.deepcopy(unet).bfloat16(), torch.bfloat16
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"),
            LoRABank(model, layout).active(vectors_KN, 2),
        ):
            y = run(model, tuple(t.to(dtype) if t.is_floating_point() else t for t in batch))
            y.float().square().mean().backward()
        assert vectors_KN.grad is not None
        assert vectors_KN.grad.dtype == torch.float32
        results[name] = y.detach().float(), vectors_KN.grad
    for full, half in zip(results["float32"], results[mode], strict=True):
        assert (full - half).norm() < 0.05 * full.norm()
        assert not torch.equal(full, half)


@pytest.fixture
def smallest_unet() -> Iterator[UNet2DConditionModel]:
    torch._dynamo.reset()
    yield tiny_unet(config=SMALLEST)
    torch._dynamo.reset()


def compile_model(unet: nn.Module) -> nn.Module:
    return torch.compile(copy.deepcopy(unet), backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_whole_graph_equals_eager_and_is_compiled_once(
    smallest_unet: UNet2DConditionModel, checkpointing: bool
) -> None:
    targets = tuple(target for target in TARGETS if target != "downsamplers.0.conv")  # it has one block only
    layout = LoRALayout.from_unet(smallest_unet, rank=2, target_modules=targets)
    compiled = compile_model(smallest_unet)
    if checkpointing:
        compiled._orig_mod.train().enable_gradient_checkpointing()
    bank, compiled_bank = LoRABank(smallest_unet, layout), LoRABank(compiled, layout)
    for seed in range(2):
        batch, gradients = random_batch(4), []
        for model, owner in ((smallest_unet, bank), (compiled, compiled_bank)):
            vectors_KN = random_vectors(layout, 2, seed).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=seed > 0), owner.active(vectors_KN, 2):
                run(model, batch).square().sum().backward()
            gradients.append(vectors_KN.grad)
        assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max()


def test_model_compiled_without_the_bank_is_refused_not_run_bare(smallest_unet: UNet2DConditionModel) -> None:
    compiled, batch = compile_model(smallest_unet), random_batch(2)
    layout = LoRALayout.from_unet(smallest_unet)
    with torch.no_grad():
        run(compiled, batch)
        with (
            pytest.raises(RuntimeError, match="compiled without the bank"),
            LoRABank(compiled, layout).active(random_vectors(layout, 2)),
        ):
            run(compiled, batch)


def test_another_copy_of_the_model_is_refused(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    bank = LoRABank(copy.deepcopy(unet), layout)
    with pytest.raises(RuntimeError, match="another copy"), torch.no_grad(), bank.active(random_vectors(layout, 1)):
        run(unet, random_batch(1))


def test_layout_of_another_model_is_refused(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    wider = UNet2DConditionModel(**{**TINY, "block_out_channels": (32, 96)})
    with pytest.raises(
        ValueError, match=r"made for another model: .* a convolution 32 -> 64 of 3 x 3, found .* 32 -> 96"
    ):
        LoRABank(wider, layout)
    fewer = UNet2DConditionModel(**{**TINY, "down_block_types": ("DownBlock2D", "DownBlock2D")})
    with pytest.raises(ValueError, match="no such module"):
        LoRABank(fewer, layout)


def test_counts_and_vectors_that_do_not_fit_are_refused(unet: UNet2DConditionModel, layout: LoRALayout) -> None:
    bank, vectors_KN = LoRABank(unet, layout), random_vectors(layout, 2)
    for vectors, counts, message in (
        (vectors_KN, [1, 2, 3], "3 counts, but there are 2 vectors"),
        (vectors_KN, [3, -1], "counts of at least 0"),
        (vectors_KN, 0, "one sample in all"),
        (vectors_KN[:0], 1, "one sample in all"),
        (vectors_KN[:, 1:], 1, "expects"),
        (vectors_KN[0], 1, "expects"),
    ):
        with pytest.raises(ValueError, match=message), bank.active(vectors, counts):
            pass
    with bank.active(vectors_KN), torch.no_grad():
        run(unet, random_batch(2))
        with pytest.raises(RuntimeError, match="active already"), bank.active(vectors_KN):
            pass


@pytest.mark.parametrize("rows", [3, 9, 12])
def test_a_batch_of_more_or_fewer_than_were_told_is_refused(
    unet: UNet2DConditionModel, layout: LoRALayout, rows: int
) -> None:
    """Also a multiple, as of guidance whose vectors were not given twice: it would draw people with each other's LoRAs."""
    bank = LoRABank(unet, layout)
    with pytest.raises(ValueError, match=f"batch of {rows}"), bank.active(random_vectors(layout, 3), 2):
        run(unet, random_batch(rows))
