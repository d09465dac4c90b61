"""A diffusers pipeline of Stable Diffusion under the names of a single-file checkpoint: those of Stability's code."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def ldm_checkpoint(pipe: Any, second: bool = False) -> dict[str, Tensor]:
    """All tensors of `pipe`; with `second`, as 2.x does, the text encoder in OpenCLIP's names and one layer more."""
    tensors = {}
    attends = ["Attn" in block for block in pipe.unet.config.up_block_types]
    for name, tensor in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, attends)] = tensor
    levels = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and "group_norm" not in name
        tensors["first_stage_model." + _vae_name(name, levels)] = tensor[..., None, None] if convolution else tensor
    text = {name.removeprefix("text_model."): tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    if getattr(pipe, "text_encoder_2", None) is not None:
        tensors |= {f"conditioner.embedders.0.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        text = {name.removeprefix("text_model."): tensor for name, tensor in pipe.text_encoder_2.state_dict().items()}
        projection = {"text_projection": text.pop("text_projection.weight").T, "logit_scale": torch.zeros(())}
        whole = _open_clip(text) | projection
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in whole.items()}
    elif second:
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in _longer(_open_clip(text)).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(1)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _unet_name(name: str, attends: list[bool]) -> str:
    for end, ldm in _UNET_ENDS.items():
        if name.startswith(end + "."):
            return name.replace(end, ldm)
    for here, there in _RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{here}\.", rf"\1.{there}.", name)
    middle = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if middle:
        return f"middle_block.{2 * int(middle[2]) + (middle[1] == 'attentions')}.{middle[3]}"
    kind, level, part, i, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()  # type: ignore[union-attr]
    if kind == "down":
        number = 1 + 3 * int(level) + (2 if part == "downsamplers" else int(i))
        return f"input_blocks.{number}.{int(part == 'attentions')}.{rest.replace('conv.', 'op.') if part == 'downsamplers' else rest}"
    number = 3 * int(level) + (2 if part == "upsamplers" else int(i))
    # an upsampler comes after the attention, where the level has one
    place = 1 + attends[int(level)] if part == "upsamplers" else int(part != "resnets")
    return f"output_blocks.{number}.{place}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "attentions" in name:
        for here, there in _VAE_ATTENTION.items():
            name = name.replace(f"attentions.0.{here}.", f"attentions.0.{there}.")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample").replace("resnets", "block")
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    return name.replace("down_blocks", "down")


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in text.items():
        name = name.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        for here, there in _OPEN_CLIP.items():
            name = name.replace(here, there)
        one = re.fullmatch(r"(.*attn)\.([qkv])_proj\.(weight|bias)", name)
        if one:
            joined.setdefault(f"{one[1]}.in_proj_{one[3]}", {})[one[2]] = tensor
        else:
            tensors[name] = tensor
    return tensors | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in joined.items()}


def _longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what OpenCLIP has and 2.x leaves out: a further layer, and the projection."""
    tensors |= {"text_projection": torch.zeros(4, 4), "logit_scale": torch.zeros(())}
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer."))
    for name in [name for name in tensors if name.startswith(f"transformer.resblocks.{last}.")]:
        tensors[name.replace(f"resblocks.{last}.", f"resblocks.{last + 1}.")] = torch.zeros_like(tensors[name])
    return tensors
