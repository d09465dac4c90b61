"""The parts of a base model, and what must hold between them: what is wrong here is wrong for everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_diffusion.models.kinds import kind_of_unet

_EXTRA_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Parts:
    """What draws a picture, of all that a pipeline of diffusers has; the last three are of Stable Diffusion XL."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool = True


def is_xl(parts: Any) -> bool:
    """Of `Parts`, a pipeline of diffusers or a base model."""
    return getattr(parts, "text_encoder_2", None) is not None


def networks_of(parts: Any) -> dict[str, torch.nn.Module]:
    """Name -> network, in an order that stays."""
    return {name: getattr(parts, name) for name in _NETWORKS if getattr(parts, name, None) is not None}


def overflows_in_half(parts: Any) -> bool:
    """Whether the VAE has to stay in float32: that of XL gives NaN in float16, unless it is the mended one, which says so."""
    return is_xl(parts) and bool(parts.vae.config.force_upcast)


def check_parts(parts: Parts) -> None:
    """Raises ValueError if this is no Stable Diffusion of ours, its parts do not fit, or a weight is not finite."""
    unet, latent = parts.unet.config, parts.vae.config.latent_channels
    kind = kind_of_unet(unet.in_channels, latent)
    if kind is not None:
        raise ValueError(f"it has {kind} where a UNet takes the {latent} channels of a latent")
    if unet.out_channels != latent:
        raise ValueError(f"its UNet gives {unet.out_channels} channels, its VAE takes {latent}")
    given = {name: getattr(unet, name, None) for name in _EXTRA_INPUTS}
    # "text" pools the prompt that is there anyway, as tiny-sd does
    known = [("addition_embed_type", "text_time" if is_xl(parts) else "text")]
    extra = [name for name, kind in given.items() if kind is not None and (name, kind) not in known]
    if extra:
        raise ValueError(f"its UNet needs more than a latent, a time and a prompt ({', '.join(extra)} is set)")
    if not isinstance(unet.sample_size, int):
        raise ValueError(
            f"its unet/config.json says sample_size {unet.sample_size}: write the side of a latent there, 64 for 512 px"
        )
    encoders = [encoder for encoder in (parts.text_encoder, parts.text_encoder_2) if encoder is not None]
    width, given_width = unet.cross_attention_dim, sum(encoder.config.hidden_size for encoder in encoders)
    if width != given_width:
        raise ValueError(f"its UNet takes prompts of width {width}, its text encoder gives {given_width}")
    if is_xl(parts):
        pooled, numbers = parts.text_encoder_2.config.projection_dim, 6 * unet.addition_time_embed_dim
        if unet.projection_class_embeddings_input_dim != pooled + numbers:
            raise ValueError(
                f"its UNet takes {unet.projection_class_embeddings_input_dim} numbers beside the prompt, Stable Diffusion XL "
                f"gives {pooled + numbers}: it may be the refiner, which draws no picture alone"
            )
    for tokenizer, encoder in zip((parts.tokenizer, parts.tokenizer_2), encoders, strict=False):
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"its tokenizer knows {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}"
            )
    if not hasattr(parts.scheduler, "alphas_cumprod") or parts.scheduler.config.prediction_type not in _PREDICTIONS:
        raise ValueError(f"its scheduler {type(parts.scheduler).__name__} is not one of noise levels (alphas_cumprod)")
    for name, network in networks_of(parts).items():
        check_finite(name, network)


def check_finite(name: str, module: torch.nn.Module) -> None:
    """Raises ValueError if a weight is NaN or infinite. Reads each weight once, at 4 to 8 GB/s on one core."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            half = " (or a number too large for float16: load it as bfloat16)" if tensor.dtype == torch.float16 else ""
            raise ValueError(f"its {name} holds a weight that is NaN or infinite{half}, in {key}: get the file again")
