"""A checkpoint of Stable Diffusion 1.x, 2.x or XL in one .safetensors file, as people download them, without network.

The names of the tensors are those of Stability's code; diffusers translates them. Widths and depths are read from the
tensors' shapes; the rest (heads, activations, noise levels, tokenizer) is the same in all models of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from lora_diffusion.models.clip_tokenizer import clip_tokenizer
from lora_diffusion.models.kinds import CHECKPOINT, XL, Shapes, kind_of_tensors, kind_of_unet, shapes_of
from lora_diffusion.models.parts import Parts
from lora_diffusion.models.single_file_text import build, count, text_encoder

Family = Literal["sd1", "sd2", "sdxl"]
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT = {  # where the text encoders are; `.transformer.` is CLIP's code, `.model.` OpenCLIP's
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # px
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

    check_name(str(path))
    shapes, metadata = shapes_of(path)
    family = _family(shapes)
    try:
        unet_config, vae_config = _unet_config(shapes, family), _vae_config(shapes, family)
        tensors = _read(path, dtype)
        unet = build(UNet2DConditionModel, unet_config, names.convert_ldm_unet_checkpoint(tensors, unet_config))
        vae = build(AutoencoderKL, vae_config, names.convert_ldm_vae_checkpoint(tensors, vae_config))
        encoders = [text_encoder(prefix, tensors, whole=family == "sdxl") for prefix in _TEXT[family]]
    except KeyError as error:
        raise ValueError(f"it lacks the tensor {error}: get the file again") from error
    # OpenCLIP pads with token 0
    tokenizers = [clip_tokenizer(**({"pad_token": "!"} if ".model." in prefix else {})) for prefix in _TEXT[family]]
    noise: dict[str, Any] = {**_NOISE_LEVELS, "prediction_type": _told_prediction(metadata, shapes)}
    if family == "sd2" and not noise["prediction_type"]:
        empty = tokenizers[0]([""], padding="max_length", return_tensors="pt").input_ids
        noise["prediction_type"] = _ask_what_it_predicts(unet, encoders[0](empty)[0])
    noise["prediction_type"] = noise["prediction_type"] or "epsilon"
    pixels = 768 if family == "sd2" and noise["prediction_type"] == "v_prediction" else _SIDES[family]
    if "ztsnr" in shapes:  # no signal is left at the last timestep, where sampling then has to begin
        noise |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    unet.register_to_config(sample_size=_side(metadata, pixels))
    scheduler = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
    parts = Parts(unet, vae, encoders[0], tokenizers[0], scheduler)
    return parts if family != "sdxl" else replace(parts, text_encoder_2=encoders[1], tokenizer_2=tokenizers[1])


def _family(shapes: Shapes) -> Family:
    """Raises ValueError for a file of no family that we load, or one that lacks a part."""
    kind = kind_of_tensors(shapes)
    if kind not in (CHECKPOINT, XL):
        raise ValueError(f"it is {kind}")
    second = any(name.startswith(_TEXT["sd2"]) for name in shapes)
    family: Family = "sdxl" if kind == XL else "sd2" if second else "sd1"
    texts = _TEXT[family] if family == "sdxl" else ("cond_stage_model.",)
    for prefix, part in ((_UNET, "UNet"), (_VAE, "VAE"), *((text, "text encoder") for text in texts)):
        if not any(name.startswith(prefix) for name in shapes):
            raise ValueError(f"it is {kind} without {part} (no tensor {prefix}...): get the full checkpoint")
    first_conv = shapes.get(_UNET + "input_blocks.0.0.weight", (0, 4))
    kind_of_input = kind_of_unet(first_conv[1], 4)
    if kind_of_input is not None:
        raise ValueError(f"it has {kind_of_input} where a UNet takes the 4 channels of a latent")
    return family


def _told_prediction(metadata: Mapping[str, str], shapes: Shapes) -> str:
    """What the UNet predicts, from metadata or an empty tensor `v_pred`, as ComfyUI has it; "" if nothing tells."""
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said.startswith("v") or "v_pred" in shapes:
        return "v_prediction"
    return "epsilon" if said.startswith("eps") else ""


def _unet_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    layer, attention = _UNET + "input_blocks.{}.0.out_layers.3.weight", _UNET + "input_blocks.{}.1."
    last = max(number for number in range(100) if layer.format(number) in shapes)
    channels = [shapes[layer.format(number)][0] for number in range(1, last + 1, 3)]
    blocks = [attention.format(1 + 3 * level) for level in range(len(channels))]  # the first of each level
    attends = [f"{block}norm.weight" in shapes for block in blocks]
    first = blocks[attends.index(True)] if any(attends) else blocks[0]
    config = {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "cross_attention_dim": shapes[first + "transformer_blocks.0.attn2.to_k.weight"][1],
        # diffusers' name for the number of heads: 1.x has 8, others have heads of 64
        "attention_head_dim": 8 if family == "sd1" else [width // 64 for width in channels],
        "use_linear_projection": len(shapes[first + "proj_in.weight"]) == 2,
    }
    if family != "sdxl":
        return config
    depth = "transformer_blocks.{}.norm1.weight"
    added = shapes[_UNET + "label_emb.0.0.weight"][1]  # the prompt's summary, and 6 numbers of 256
    return config | {
        "transformer_layers_per_block": [max(1, count(shapes, block + depth)) for block in blocks],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (added - shapes[_TEXT["sdxl"][1] + "text_projection"][1]) // 6,
        "projection_class_embeddings_input_dim": added,
    }


def _vae_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    levels = count(shapes, _VAE + "encoder.down.{}.block.0.conv1.weight")
    return {
        "latent_channels": shapes[_VAE + "post_quant_conv.weight"][0],
        "layers_per_block": count(shapes, _VAE + "encoder.down.0.block.{}.conv1.weight"),
        "block_out_channels": [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
    }


def _read(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is used, in `dtype`; a copy of the UNet's weights averaged over training (model_ema) is not."""
    with safetensors.safe_open(str(path), "pt") as file:
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name in file.keys()  # noqa: SIM118 (no mapping)
            if name.startswith((_UNET, _VAE, "cond_stage_model.", "conditioner."))
            for tensor in [file.get_tensor(name)]
        }


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
