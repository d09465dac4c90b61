"""Where each LoRA matrix lies in the flat vector: one order, one `layout_id`.

The flat vector is the parameter: fine-tuning optimises a (K, N) matrix, a Parquet row holds one row of it, the VAE
encodes it. Nothing but this file and the format adapters knows module names.

The order is that of weights2weights (arXiv:2406.09413): tensors sorted by their peft key
(`<module>.lora_A.weight`, `<module>.lora_B.weight`), flattened row by row, concatenated. Keys sort as strings, so
block 10 comes before block 2, as in their files.

A convolution is a linear layer over patches: its A (R, I) is the (R, channels in, height, width) filter of peft
flattened, its B (O, R) peft's 1 x 1 convolution.

Axes: K identities together, N vector length, R rank, I / O features in / out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # a driver or a reader of shards needs no torch, which takes seconds to import
    import numpy.typing as npt
    from torch import Tensor, nn

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LoRAEntry:
    """One adapted layer: A (R, I) starts at `offset_A` of the vector, B (O, R) at `offset_B`.

    `kernel` is (height, width) of a convolution, and I = channels in * height * width; () is a linear layer.
    """

    name: str
    in_features: int
    out_features: int
    offset_A: int
    offset_B: int
    kernel: tuple[int, ...] = ()

    @property
    def weight_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of peft's `lora_A.weight` and `lora_B.weight`, without the rank: (I...), (O...)."""
        channels = self.in_features // math.prod(self.kernel)
        return (channels, *self.kernel), (self.out_features, *(1 for _ in self.kernel))


Vector: TypeAlias = "Tensor | npt.NDArray[Any]"
LayerShape: TypeAlias = tuple[int, int] | tuple[int, int, tuple[int, int]]
"""(features in, features out) of a linear layer; (channels in, channels out, (height, width)) of a convolution."""


@dataclass(frozen=True, repr=False)
class LoRALayout:
    """The map between a vector of N floats and the (A, B) pairs of the adapted layers.

    A layer computes `y = W x + b + scale * B (A x)`, with `scale = alpha / rank` as in peft.
    Build it with `from_unet`, or read it from an artifact with `from_dict`.
    """

    entries: tuple[LoRAEntry, ...]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __repr__(self) -> str:
        return f"LoRALayout({self.layout_id}: {len(self.entries)} layers, rank={self.rank}, alpha={self.alpha:g}, size={self.size})"

    @classmethod
    def from_unet(
        cls,
        unet: nn.Module,
        rank: int = 1,
        target_modules: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        alpha: float = 1.0,
    ) -> LoRALayout:
        """Layout of rank-`rank` LoRAs on all linear layers and convolutions whose names end in one of `target_modules`.

        A target matches whole path parts, as in peft: "to_q" matches "mid_block.attn1.to_q", not "my_to_q".
        The UNet may lie on the meta device: only names and shapes are read.

        Raises:
            ValueError: a target matches no module, or one that is neither `nn.Linear` nor a plain `nn.Conv2d`.
        """
        targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
        if not targets:
            raise ValueError("target_modules is empty: name at least one kind of layer, for example ('to_q', 'to_v')")
        shapes: dict[str, LayerShape] = {}
        for target in targets:
            matched = [(name, module) for name, module in unet.named_modules() if _matches(name, target)]
            if not matched:
                known = sorted({_kind(name) for name, module in unet.named_modules() if shape_of(module)})
                raise ValueError(f"target module {target!r} matches no module of the model; its layers: {known}")
            for name, module in matched:
                shape = shape_of(module)
                if shape is None:
                    raise ValueError(
                        f"target module {target!r} matches {name!r}, a {type(module).__name__}; only nn.Linear and "
                        "nn.Conv2d without groups can carry a LoRA here: name a longer suffix that ends in one "
                        "(for example 'to_out.0')"
                    )
                shapes[name] = shape
        return cls.from_shapes(shapes, rank=rank, alpha=alpha, target_modules=targets)

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, LayerShape], *, rank: int, alpha: float, target_modules: Sequence[str]
    ) -> LoRALayout:
        """Layout over layers given as name -> shape, in any order."""
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoRA needs a rank of at least 1")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; it scales the update by alpha / rank and must be positive and finite")
        entries, offset = [], 0
        for name in sorted(shapes, key=lambda name: f"{name}.lora_A.weight"):
            inputs, out_features, *kernel = shapes[name]
            in_features = inputs * math.prod(kernel[0]) if kernel else inputs
            offset_B = offset + rank * in_features
            entries.append(LoRAEntry(name, in_features, out_features, offset, offset_B, *kernel))
            offset = offset_B + rank * out_features
        return cls(tuple(entries), rank, float(alpha), tuple(target_modules))

    @cached_property
    def size(self) -> int:
        """N, the number of floats of one LoRA."""
        return sum(self.split_sizes)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __hash__(self) -> int:
        return hash(self.layout_id)  # computed once; a tuple of hundreds of entries is not

    @cached_property
    def split_sizes(self) -> tuple[int, ...]:
        """Lengths of A, B, A, B, ... in the vector's order."""
        return tuple(self.rank * n for entry in self.entries for n in (entry.in_features, entry.out_features))

    @cached_property
    def layout_id(self) -> str:
        """16 hex digits that name what a vector means: modules, shapes, order, rank and alpha.

        `target_modules` is left out: two ways to name the same modules give vectors that mean the same.
        """
        identity = {k: v for k, v in self._fields().items() if k != "target_modules"}
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def split(self, vectors_KN: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views name -> (A_KRI, B_KOR) of the rows of `vectors_KN`; no copy, and gradients flow back to it.

        All views come from one `torch.split`, whose backward is one concatenation; a slice for each matrix would
        write a whole (K, N) gradient each.
        """
        self.check(vectors_KN)
        K, R = vectors_KN.shape[0], self.rank
        pieces = vectors_KN.split(self.split_sizes, dim=1)
        return {
            entry.name: (A.view(K, R, entry.in_features), B.view(K, entry.out_features, R))
            for entry, A, B in zip(self.entries, pieces[0::2], pieces[1::2], strict=True)
        }

    def join(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Vectors (K, N) from name -> (A_KRI, B_KOR): the inverse of `split`.

        Raises:
            ValueError: modules are missing or unknown, or a matrix has another shape than the layout says.
        """
        missing = [entry.name for entry in self.entries if entry.name not in matrices]
        unknown = sorted(set(matrices) - {entry.name for entry in self.entries})
        if missing or unknown:
            raise ValueError(
                f"the matrices do not fit layout {self.layout_id}: missing {missing[:4]} ({len(missing)} in all), "
                f"unknown {unknown[:4]} ({len(unknown)} in all)"
            )
        K = matrices[self.entries[0].name][0].shape[0]
        pieces = []
        for entry in self.entries:
            A_KRI, B_KOR = matrices[entry.name]
            expected = (K, self.rank, entry.in_features), (K, entry.out_features, self.rank)
            if (tuple(A_KRI.shape), tuple(B_KOR.shape)) != expected:
                raise ValueError(
                    f"{entry.name}: A is {tuple(A_KRI.shape)} and B is {tuple(B_KOR.shape)}; "
                    f"the layout expects (K, R, I) = {expected[0]} and (K, O, R) = {expected[1]}"
                )
            pieces += [A_KRI.reshape(K, -1), B_KOR.reshape(K, -1)]
        import torch

        return torch.cat(pieces, dim=1)

    def mask_B(self) -> Tensor:
        """Boolean (N,): True where the vector holds a B matrix. With A shared and frozen these are what is learned."""
        import torch

        is_B = torch.tensor([False, True]).repeat(len(self.entries))
        return is_B.repeat_interleave(torch.tensor(self.split_sizes))

    def check(self, vectors_KN: Tensor) -> None:
        """Raises ValueError unless `vectors_KN` has the shape (K, N) of this layout."""
        if vectors_KN.ndim != 2 or vectors_KN.shape[1] != self.size:
            raise ValueError(
                f"vectors have shape {tuple(vectors_KN.shape)}; layout {self.layout_id} (rank {self.rank}, "
                f"{len(self.entries)} modules) expects (K, {self.size}), one row for each LoRA"
            )

    def as_vector(self, values_N: Vector) -> Tensor:
        """One vector (N,) on the CPU, without gradient. Raises ValueError for another shape, or numbers that are no floats."""
        import torch

        tensor = torch.as_tensor(values_N).detach().cpu()
        if tuple(tensor.shape) != (self.size,) or not tensor.is_floating_point():
            raise ValueError(
                f"the vector is {tensor.dtype} of shape {tuple(tensor.shape)}; layout {self.layout_id} expects floats of "
                f"shape ({self.size},): one LoRA, one row of the corpus"
            )
        return tensor

    def _fields(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "rank": self.rank,
            "alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "modules": [
                [e.name, e.weight_shapes[0][0], e.out_features, *([list(e.kernel)] if e.kernel else [])]
                for e in self.entries
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description, with `size` and `layout_id` for readers that do not compute them."""
        return {**self._fields(), "size": self.size, "layout_id": self.layout_id}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoRALayout:
        """Inverse of `to_dict`.

        Raises:
            ValueError: another format version, modules out of order, or a `layout_id` that does not fit the content.
        """
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"layout has format version {version}; this code reads {FORMAT_VERSION}")
        try:
            shapes: dict[str, LayerShape] = {
                str(name): (int(i), int(o), (int(kernel[0][0]), int(kernel[0][1]))) if kernel else (int(i), int(o))
                for name, i, o, *kernel in data["modules"]
            }
            layout = cls.from_shapes(
                shapes, rank=int(data["rank"]), alpha=float(data["alpha"]), target_modules=tuple(data["target_modules"])
            )
            same = [entry.name for entry in layout.entries] == list(shapes) and layout.layout_id == data["layout_id"]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ValueError(f"layout was edited by hand or cut ({error!r}): read it again from the corpus") from error
        if not same:
            raise ValueError(
                f"layout says it is {data.get('layout_id')}, but its content is {layout.layout_id}: "
                "it was edited by hand or cut; read it again from the corpus"
            )
        return layout


def shape_of(module: nn.Module | None) -> LayerShape | None:
    """Shape of a layer that can carry a LoRA: linear, or a convolution over zero padding without groups or dilation."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.dilation != (1, 1):
        return None
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    return module.in_channels, module.out_channels, (module.kernel_size[0], module.kernel_size[1])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _kind(name: str) -> str:
    """The part of a module name that is the same in every block: 'x.0.attn1.to_out.0' -> 'to_out.0'."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])
