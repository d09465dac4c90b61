"""Rows of weights2weights' corpus (arXiv:2406.09413): plain tensors in our order, with alpha 27. Axes: N vector length."""

import torch
from torch import Tensor

from lora_diffusion.lora.layout import LoRALayout, Vector

W2W_ALPHA = 27.0
"""alpha of every LoRA in weights2weights' corpus (their rank is 1, so the scale is 27 too)."""


def from_weights2weights(row_N: Tensor, layout: LoRALayout, *, rescale: bool = False) -> Tensor:
    """Vector (N,), float32, of one row of weights2weights' corpus (arXiv:2406.09413): our order, alpha 27.

    A layout with another alpha is refused, unless `rescale=True` (see `load`). Raises `ValueError` on a wrong shape.
    """
    return _from_alpha_to_alpha(layout.as_vector(row_N).float(), layout, W2W_ALPHA, layout.alpha, rescale)


def to_weights2weights(vector_N: Vector, layout: LoRALayout, *, rescale: bool = False) -> Tensor:
    """Row (N,), float32, for weights2weights' code, which takes alpha = 27: the inverse of `from_weights2weights`."""
    return _from_alpha_to_alpha(layout.as_vector(vector_N).float(), layout, layout.alpha, W2W_ALPHA, rescale)


def _from_alpha_to_alpha(vector_N: Tensor, layout: LoRALayout, alpha: float, new_alpha: float, rescale: bool) -> Tensor:
    """The vector that does under `new_alpha` what `vector_N` does under `alpha`: its B times alpha / new_alpha."""
    if alpha == new_alpha:
        return vector_N
    if not rescale:
        raise ValueError(
            f"weights2weights' LoRAs have alpha {W2W_ALPHA:g}, the layout has {layout.alpha:g}: pass rescale=True to "
            f"fold the difference into B, or use a layout with alpha={W2W_ALPHA:g}"
        )
    return torch.where(layout.mask_B(), vector_N * (alpha / new_alpha), vector_N)
