"""A UNet like the shipped one, but narrower and with random weights: the laws of LoRAs hold for it just as well."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


# One attention block only, for tests that compile, which takes seconds for each block.
SMALLEST = {
    **TINY,
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def tiny_unet(seed: int = 0, config: dict[str, Any] = TINY) -> UNet2DConditionModel:
    """Frozen, in eval mode, with random weights."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval().requires_grad_(False)
