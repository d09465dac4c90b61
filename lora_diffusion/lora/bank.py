"""Run K different LoRAs in one forward pass of one frozen model.

Two users: the corpus job fine-tunes K people at once, the renderer draws K people in one batch. The base layer
`W x + b` is computed once for the whole batch; a forward hook adds each identity's own low-rank part to its own rows.
A convolution's A is applied as one product over channels for all places of its kernel, and R small maps are shifted
and summed: the patches are never laid out.
Hooks change no class, weight or state dict, and are gone after the `with` block, whatever happened in it.

Axes: B batch, K identities together, N vector length, R rank, I / O features in / out,
n samples of one identity, T rows of one identity in one linear layer (its samples × the positions of each),
P kernel places, H / W height and width of a feature map.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.lora.layout import LoRAEntry, LoRALayout, shape_of


class LoRABank:
    """Adds the LoRAs of `layout` to `unet` while `active`.

    The batch is identity-major: all samples of identity 0, then all of identity 1, and so on. Classifier-free guidance
    that stacks `[unconditional, conditional]` is K identities twice: `bank.active(torch.cat([v_KN, v_KN]), n)`.

    Works with autocast, `torch.compile` and gradient checkpointing; with the last, run the backward inside the block
    too, as it recomputes the forward. Compile with the bank active: a graph that was compiled without hooks does not
    look for new ones (`torch._dynamo.config.skip_nnmodule_hook_guards`), and the bank raises rather than let it
    silently run the bare model.

    Raises:
        ValueError: the layout names a layer that `unet` lacks, or that has another size.
    """

    def __init__(self, unet: nn.Module, layout: LoRALayout) -> None:
        self.layout = layout
        self._unet: nn.Module = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the model whose layers we adapt
        modules = dict(self._unet.named_modules())
        self._layers = {e.name: _layer_of(modules.get(e.name), e, layout) for e in layout.entries}
        self._state: _State | None = None

    def __repr__(self) -> str:
        return f"LoRABank({self.layout!r})"

    @contextmanager
    def active(
        self, vectors_KN: Tensor, samples_per_identity: int | Sequence[int] = 1, *, train_A: bool = True
    ) -> Iterator[None]:
        """While active, sample b of a forward uses the LoRA of its identity: `y = W x + b + scale * B (A x)`.

        Args:
            vectors_KN: one LoRA a row, on any device, usually float32. They are cast once to the dtype of the adapted
                layers; where they require grad, the gradient arrives in the (K, N) matrix in its own dtype.
            samples_per_identity: n, the same for all, or one count for each identity. A forward then takes a batch
                of n * K, or of their sum.
            train_A: False spares the backward the gradients of A; they arrive as zeros.

        Raises:
            ValueError: vectors of another layout, or counts or a batch that do not fit.
            RuntimeError: the bank is active already, or no adapted layer ran through it.
        """
        if self._state is not None:
            raise RuntimeError("this bank is active already; leave its `with` block before you enter another")
        self._state = state = _State(self._layers, self.layout, vectors_KN, samples_per_identity, train_A)
        # Layers note that they ran; inside a compiled checkpoint they may not, so there the model notes it for them.
        state.checkpointed = bool(getattr(self._unet, "is_gradient_checkpointing", False))
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]
        if state.checkpointed:
            handles.append(self._unet.register_forward_pre_hook(self._note_run))
        try:
            yield
        finally:
            self._state = None
            for handle in handles:
                handle.remove()
        if not state.ran:
            raise RuntimeError(
                "no adapted layer ran through the bank: either another copy of the model ran, or one that was compiled "
                "without the bank. In the second case make the first compiled call with the bank active, or set "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False before the first call"
            )

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add_low_rank_update(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            state = self._state
            assert state is not None
            if not state.checkpointed:
                state.ran = True
            if isinstance(module, nn.Conv2d):
                return state.update_convolution(name, module, inputs[0], y)
            return state.update_linear(name, inputs[0], y)

        return add_low_rank_update

    def _note_run(self, module: nn.Module, inputs: object) -> None:
        assert self._state is not None
        self._state.ran = True


class _State:
    """The matrices of one `active` block, ready for batched products."""

    def __init__(
        self,
        layers: dict[str, nn.Linear | nn.Conv2d],
        layout: LoRALayout,
        vectors_KN: Tensor,
        counts: int | Sequence[int],
        train_A: bool,
    ) -> None:
        layout.check(vectors_KN)
        weight = next(iter(layers.values())).weight
        dtype = weight.dtype if weight.dtype.is_floating_point else vectors_KN.dtype
        vectors_KN = vectors_KN.to(weight.device, dtype)
        self.groups, self.batch, vectors_KN = _group(vectors_KN, counts)
        self.scale = layout.scale
        self.ran = False
        self.checkpointed = False
        # B is kept as (K, R, O): with B as (K, O, R), the products with it and its gradient run 3-8 times slower at
        # small ranks (they reach no fast path of the BLAS). The copy is small, and for rank 1 it is only a view.
        self.matrices = {
            name: (
                (A_KRI if train_A else A_KRI.detach()).transpose(1, 2),
                B_KOR.view(-1, 1, B_KOR.shape[1]) if layout.rank == 1 else B_KOR.transpose(1, 2).contiguous(),
            )
            for name, (A_KRI, B_KOR) in layout.split(vectors_KN).items()
        }

    def update_linear(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        A_KIR, B_KRO = self.matrices[name]
        self._check(name, x)
        x_KTI = x.reshape(self.groups, -1, x.shape[-1])
        y_KTO = y.reshape(self.groups, -1, y.shape[-1])
        return torch.baddbmm(y_KTO, torch.bmm(x_KTI, A_KIR), B_KRO, alpha=self.scale).view(y.shape)

    def update_convolution(self, name: str, layer: nn.Conv2d, x: Tensor, y: Tensor) -> Tensor:
        A_KIR, B_KRO = self.matrices[name]
        self._check(name, x)
        K, C, P = self.groups, x.shape[1], layer.kernel_size[0] * layer.kernel_size[1]
        x_KnCS = x.reshape(K, -1, C, x.shape[2] * x.shape[3])
        A_KPRC = A_KIR.view(K, C, P, -1).permute(0, 2, 3, 1)
        maps_KnQS = torch.matmul(A_KPRC.reshape(K, 1, -1, C), x_KnCS)  # Q = P * R
        low_BRS = _shift_and_sum(maps_KnQS.view(x.shape[0], P, -1, *x.shape[2:]), layer).flatten(2)
        low_KnRS = low_BRS.view(K, -1, *low_BRS.shape[1:])
        update = torch.matmul(B_KRO.transpose(1, 2)[:, None] * self.scale, low_KnRS)
        return y + update.view(y.shape)

    def _check(self, name: str, x: Tensor) -> None:
        if x.shape[0] != self.batch:
            raise ValueError(
                f"{name} got a batch of {x.shape[0]}, but the bank is active for {self.batch} samples "
                f"in {self.groups} groups; say how many belong to each identity with samples_per_identity"
            )


def _shift_and_sum(maps_BPRHW: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, R, H', W'): map p moved to where place p of the kernel meets it, summed over p, in the strides of `layer`.

    That is a convolution with a filter of zeros and ones.
    """
    P, R = maps_BPRHW.shape[1:3]
    place_PP = torch.eye(P, dtype=maps_BPRHW.dtype, device=maps_BPRHW.device)
    filter_RQhw = torch.einsum("rs,pk->rpsk", place_PP.new_ones(R).diag(), place_PP).reshape(
        R, P * R, *layer.kernel_size
    )
    return F.conv2d(maps_BPRHW.flatten(1, 2), filter_RQhw, stride=layer.stride, padding=layer.padding)


def _group(vectors_KN: Tensor, counts: int | Sequence[int]) -> tuple[int, int, Tensor]:
    """(groups, batch, vectors): the batch falls into equal groups of neighbours, each with its own row of vectors.

    Equal counts keep one group for each identity. Otherwise each sample is a group and rows are repeated, once for
    the whole matrix: little against a forward pass. `expand` sums their gradients in a fixed order, unlike indexing.
    """
    K = vectors_KN.shape[0]
    counts_K = [counts] * K if isinstance(counts, int) else list(counts)
    if len(counts_K) != K:
        raise ValueError(f"samples_per_identity has {len(counts_K)} counts, but there are {K} vectors")
    if min(counts_K, default=0) < 0 or sum(counts_K) < 1:
        raise ValueError(f"samples_per_identity is {counts}; it needs counts of at least 0 and one sample in all")
    if len(set(counts_K)) == 1:
        return K, K * counts_K[0], vectors_KN
    vectors_BN = torch.cat([row.expand(n, -1) for row, n in zip(vectors_KN.split(1), counts_K, strict=True)])
    return sum(counts_K), sum(counts_K), vectors_BN


def _layer_of(module: nn.Module | None, entry: LoRAEntry, layout: LoRALayout) -> nn.Linear | nn.Conv2d:
    """The layer of `entry`, once it is sure that the layout was made for this model."""
    found = shape_of(module)
    expected = (entry.weight_shapes[0][0], entry.out_features, *([entry.kernel] if entry.kernel else []))
    if found != expected or not isinstance(module, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"layout {layout.layout_id} was made for another model: it expects {entry.name} to be "
            f"{_describe(expected)}, found {_describe(found) if found else _kind_of(module)}. "
            "Build it with LoRALayout.from_unet"
        )
    return module


def _describe(shape: tuple[Any, ...]) -> str:
    if len(shape) == 2:
        return f"a linear layer {shape[0]} -> {shape[1]}"
    return f"a convolution {shape[0]} -> {shape[1]} of {shape[2][0]} x {shape[2][1]}"


def _kind_of(module: nn.Module | None) -> str:
    return "no such module" if module is None else type(module).__name__
