"""A checkpoint of Stable Diffusion 1.x or 2.x in one .safetensors file, as people download them, without network.

The names of the tensors are those of the latent-diffusion code; diffusers translates them. Widths and depths are read
from the tensors' shapes; the rest (heads, activations, noise levels, tokenizer) is the same in all models of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from lora_diffusion.models.clip_tokenizer import clip_tokenizer
from lora_diffusion.models.kinds import CHECKPOINT, Shapes, kind_of_tensors, kind_of_unet, shapes_of
from lora_diffusion.models.parts import Parts

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # text encoder of 1.x and of 2.x
_NOISE_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_REWRITE = (
    "import torch, safetensors.torch as s; d = torch.load('{old}', 'cpu', weights_only=False); d = d.get('state_dict', d); "
    "s.save_file({{k: v.clone() for k, v in d.items() if torch.is_tensor(v)}}, '{new}')"
)


def is_weights(name: str) -> bool:
    """Whether this is the name of one file of weights, and not of a folder."""
    return Path(name).suffix.lower() in (".safetensors", ".gguf", *_PICKLES)


def check_name(name: str) -> None:
    """Raises ValueError for a file that is not opened, by its suffix."""
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        command = _REWRITE.format(old=name, new=Path(name).with_suffix(".safetensors"))
        raise ValueError(
            f"it is a pickle ({suffix}), which can run any code and is not opened; if you trust it, rewrite it by "
            f'python -c "{command}"'
        )
    if suffix != ".safetensors":
        raise ValueError(f"it is a file ({suffix or 'without suffix'}) and no .safetensors checkpoint")


def load(path: Path, dtype: torch.dtype) -> Parts:
    """Raises ValueError: what the file is instead, or what it lacks."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as names
    from transformers import CLIPTextConfig, CLIPTextModel

    check_name(str(path))
    shapes, metadata = shapes_of(path)
    second = _is_second(shapes)
    try:
        unet_config, vae_config = _unet_config(shapes, second), _vae_config(shapes)
        text_config = _text_config(shapes, second)
        tensors = _read(path, dtype)
        unet = _build(UNet2DConditionModel, unet_config, names.convert_ldm_unet_checkpoint(tensors, unet_config))
        vae = _build(AutoencoderKL, vae_config, names.convert_ldm_vae_checkpoint(tensors, vae_config))
        text_encoder = _build(CLIPTextModel, CLIPTextConfig(**text_config), _text_weights(tensors, text_config))
    except KeyError as error:
        raise ValueError(f"it lacks the tensor {error}: get the file again") from error
    padding = {"pad_token": "!"} if second else {}  # OpenCLIP pads with token 0
    tokenizer = clip_tokenizer(**padding)
    prediction = metadata.get("modelspec.prediction_type", "").lower()
    if prediction.startswith(("v", "eps")) or not second:
        prediction = "v_prediction" if prediction.startswith("v") else "epsilon"
    else:
        empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        prediction = _ask_what_it_predicts(unet, text_encoder(empty)[0])
    unet.register_to_config(sample_size=_side(metadata, 768 if second and prediction == "v_prediction" else 512))
    scheduler = DDIMScheduler(**_NOISE_LEVELS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    return Parts(unet, vae, text_encoder, tokenizer, scheduler)


def _is_second(shapes: Shapes) -> bool:
    """Whether the family is 2.x; else it is 1.x. Raises ValueError for anything else."""
    kind = kind_of_tensors(shapes)
    if kind != CHECKPOINT:
        raise ValueError(f"it is {kind}")
    for prefix, part in ((_VAE, "VAE"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in shapes):
            raise ValueError(f"it holds a UNet and no {part}: get the full checkpoint")
    first_conv = shapes.get(_UNET + "input_blocks.0.0.weight", (0, 4))
    kind_of_input = kind_of_unet(first_conv[1], 4)
    if kind_of_input is not None:
        raise ValueError(f"it has {kind_of_input} where a UNet takes the 4 channels of a latent")
    return any(name.startswith(_OPEN_CLIP) for name in shapes)


def _count(shapes: Shapes, name: str) -> int:
    """How many of `name`, with 0, 1, ... for {}, there are."""
    number = 0
    while name.format(number) in shapes:
        number += 1
    return number


def _unet_config(shapes: Shapes, second: bool) -> dict[str, Any]:
    layer = _UNET + "input_blocks.{}.0.out_layers.3.weight"
    last = max(number for number in range(100) if layer.format(number) in shapes)
    channels = [shapes[layer.format(number)][0] for number in range(1, last + 1, 3)]
    attends = [f"{_UNET}input_blocks.{1 + 3 * level}.1.norm.weight" in shapes for level in range(len(channels))]
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "cross_attention_dim": shapes[_UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1],
        # diffusers' name for the number of heads: 1.x has 8, 2.x has heads of 64
        "attention_head_dim": [width // 64 for width in channels] if second else 8,
        "use_linear_projection": len(shapes[_UNET + "input_blocks.1.1.proj_in.weight"]) == 2,
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, _VAE + "encoder.down.{}.block.0.conv1.weight")
    return {
        "latent_channels": shapes[_VAE + "post_quant_conv.weight"][0],
        "layers_per_block": _count(shapes, _VAE + "encoder.down.0.block.{}.conv1.weight"),
        "block_out_channels": [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.18215,
    }


def _text_config(shapes: Shapes, second: bool) -> dict[str, Any]:
    if second:
        prefix, layers, wide = (
            _OPEN_CLIP,
            "transformer.resblocks.{}.ln_1.weight",
            "transformer.resblocks.0.mlp.c_fc.weight",
        )
        token, position = "token_embedding.weight", "positional_embedding"
    else:
        prefix = _CLIP + ("text_model." if any(name.startswith(_CLIP + "text_model.") for name in shapes) else "")
        layers, wide = "encoder.layers.{}.layer_norm1.weight", "encoder.layers.0.mlp.fc1.weight"
        token, position = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    vocabulary, width = shapes[prefix + token]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[prefix + wide][0],
        "num_hidden_layers": _count(shapes, prefix + layers) - second,  # 2.x reads the last layer but one
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes[prefix + position][0],
        "hidden_act": "gelu" if second else "quick_gelu",
    }


def _text_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    if _OPEN_CLIP + "positional_embedding" in tensors:
        beyond = f"{_OPEN_CLIP}transformer.resblocks.{config['num_hidden_layers']}."
        unused = (beyond, _OPEN_CLIP + "text_projection", _OPEN_CLIP + "logit_scale")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}

        class Sized:  # the width, where the converter looks for it
            class config:
                hidden_size = config["hidden_size"]

        found = convert_open_clip_checkpoint(Sized, kept)
    else:
        found = {name.removeprefix(_CLIP): tensor for name, tensor in tensors.items() if name.startswith(_CLIP)}
    # transformers calls them text_model.* or not, depending on its version
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items() if "position_ids" not in name}


def _read(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is used, in `dtype`; a copy of the UNet's weights averaged over training (model_ema) is not."""
    with safetensors.safe_open(str(path), "pt") as file:
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name in file.keys()  # noqa: SIM118 (no mapping)
            if name.startswith((_UNET, _VAE, "cond_stage_model."))
            for tensor in [file.get_tensor(name)]
        }


def _build(cls: Callable[..., Any], config: Any, weights: Mapping[str, Tensor]) -> Any:
    """A model that takes over the tensors as they are. Raises ValueError if one is missing, superfluous or misshapen."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls(**config) if isinstance(config, dict) else cls(config)
    prefix = "text_model." if hasattr(model, "text_model") else ""
    try:
        model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ValueError(f"its {cls.__name__} is not as in Stable Diffusion 1.x and 2.x ({reason})") from error
    return model.eval()


@torch.no_grad()
def _ask_what_it_predicts(unet: Any, prompt_1SD: Tensor) -> str:
    """Files of 2.x come in two kinds and mostly do not tell which, so the UNet is asked.

    At the last timestep a latent is noise but for 0.5 % of its variance: a UNet that predicts noise gives back what it
    gets; one that predicts v gives the negative of a picture, which does not look like it.
    """
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
    answer = unet(noise, 999, prompt_1SD).sample
    alike = torch.cosine_similarity(answer.float().flatten(), noise.float().flatten(), dim=0)
    return "epsilon" if alike > 0.5 else "v_prediction"


def _side(metadata: Mapping[str, str], pixels: int) -> int:
    """Side of the latents, from `modelspec.resolution` ("768x768") or what the family has."""
    number = metadata.get("modelspec.resolution", "").lower().partition("x")[0].strip()
    return (int(number) if number.isdigit() and int(number) >= 64 else pixels) // 8
