"""The parts of a base model, and what must hold between them: what is wrong here is wrong for everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_diffusion.models.kinds import kind_of_unet

_EXTRA_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Parts:
    """What draws a picture, of all that a StableDiffusionPipeline has."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any


def check_parts(parts: Parts) -> None:
    """Raises ValueError if this is no Stable Diffusion 1.x or 2.x, its parts do not fit, or a weight is not finite."""
    unet, text = parts.unet.config, parts.text_encoder.config
    latent = parts.vae.config.latent_channels
    kind = kind_of_unet(unet.in_channels, latent)
    if kind is not None:
        raise ValueError(f"it has {kind} where a UNet takes the {latent} channels of a latent")
    if unet.out_channels != latent:
        raise ValueError(f"its UNet gives {unet.out_channels} channels, its VAE takes {latent}")
    given = {name: getattr(unet, name, None) for name in _EXTRA_INPUTS}
    # "text" pools the prompt that is there anyway, as tiny-sd does
    extra = [
        name for name, kind in given.items() if kind is not None and (name, kind) != ("addition_embed_type", "text")
    ]
    if extra:
        raise ValueError(f"its UNet needs more than a latent, a time and a prompt ({', '.join(extra)} is set)")
    if not isinstance(unet.sample_size, int):
        raise ValueError(
            f"its unet/config.json says sample_size {unet.sample_size}: write the side of a latent there, 64 for 512 px"
        )
    width = unet.cross_attention_dim
    if width != text.hidden_size:
        raise ValueError(f"its UNet takes prompts of width {width}, its text encoder gives {text.hidden_size}")
    if len(parts.tokenizer) > text.vocab_size:
        raise ValueError(f"its tokenizer knows {len(parts.tokenizer)} tokens, its text encoder {text.vocab_size}")
    if not hasattr(parts.scheduler, "alphas_cumprod") or parts.scheduler.config.prediction_type not in _PREDICTIONS:
        raise ValueError(f"its scheduler {type(parts.scheduler).__name__} is not one of noise levels (alphas_cumprod)")
    for name in ("unet", "vae", "text_encoder"):
        check_finite(name, getattr(parts, name))


def check_finite(name: str, module: torch.nn.Module) -> None:
    """Raises ValueError if a weight is NaN or infinite. Reads each weight once, at 4 to 8 GB/s on one core."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            half = " (or a number too large for float16: load it as bfloat16)" if tensor.dtype == torch.float16 else ""
            raise ValueError(f"its {name} holds a weight that is NaN or infinite{half}, in {key}: get the file again")
