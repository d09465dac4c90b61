"""LoRAs of one rank and scale as LoRAs of another: exact by padding, or the closest ones by an SVD.

Axes: R rank, I / O features in / out.
"""

import math

import torch
from torch import Tensor

from lora_diffusion.lora.canonical import svd_of_product
from lora_diffusion.lora.foreign import Layer


def fit(layer: Layer, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, I) and B (O, rank) whose update under `scale` is that of `layer`, or the closest one of that rank.

    A scale that is the same to float precision leaves all bits as they are, and so does padding.
    """
    A_RI, B_OR = layer.A_RI, layer.B_OR
    if not math.isclose(layer.scale, scale, rel_tol=max(1e-6, layer.precision)):
        B_OR = B_OR * (layer.scale / scale)
    if layer.rank > rank:
        U_1OR, s_1R, V_1IR = svd_of_product(A_RI[None], B_OR[None])
        root_R = s_1R[0, :rank].sqrt()
        A_RI, B_OR = (V_1IR[0, :, : len(root_R)] * root_R).T, U_1OR[0, :, : len(root_R)] * root_R
    missing = rank - len(A_RI)
    if missing:
        A_RI = torch.cat([A_RI, A_RI.new_zeros(missing, A_RI.shape[1])])
        B_OR = torch.cat([B_OR, B_OR.new_zeros(B_OR.shape[0], missing)], dim=1)
    return A_RI, B_OR


def energy(A_RI: Tensor, B_OR: Tensor) -> float:
    """Squared Frobenius norm of B A, without forming it."""
    return float(((B_OR.T @ B_OR).double() * (A_RI @ A_RI.T).double()).sum())
