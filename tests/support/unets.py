"""The UNets of Stability's models without weights, for what depends on names and shapes alone."""

from __future__ import annotations

from functools import cache

import torch
from diffusers import UNet2DConditionModel

_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CONFIGS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": _SDXL,
}


@cache
def meta_unet(family: str) -> UNet2DConditionModel:
    """`family`: sd1, sd2 or sdxl."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **_CONFIGS[family])
