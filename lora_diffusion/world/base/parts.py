"""The parts of ``tiny-sd``, untrained: plain diffusers and transformers classes, so the result is a
``StableDiffusionPipeline`` folder like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BaseModelConfig:
    """Sizes of ``tiny-sd``: 64x64 px pictures, 16x16 latents; 10 MB in float16.

    The finest level of the UNet has no attention: it carries edges, and everything said in words acts at 8x8 and 4x4.
    """

    image_size: int = 64
    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (16, 32, 64)
    unet_channels: tuple[int, ...] = (48, 96, 96)
    unet_attention: tuple[bool, ...] = (False, True, True)
    unet_layers: int = 1
    attention_head_dim: int = 32
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 112
    vocab_size: int = 1024
    prediction_type: str = "v_prediction"


def train_tokenizer(captions: Iterable[str], config: BaseModelConfig) -> Any:
    """A ``CLIPTokenizer`` with byte-pair merges learned from ``captions``: their words become single tokens."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[start, end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    vocab = dict(model["vocab"])
    for letter in pre_tokenizers.ByteLevel.alphabet():  # unseen words fall apart into bytes, not into "unknown"
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.text_tokens)


def new_autoencoder(config: BaseModelConfig) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.models.resnet import ResnetBlock2D

    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.image_size,
        mid_block_add_attention=False,
    )
    # Residual branches start at zero: the autoencoder begins nearly linear and learns several times faster.
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    return vae


def new_unet(config: BaseModelConfig) -> Any:
    from diffusers import UNet2DConditionModel

    attention = config.unet_attention
    unet = UNet2DConditionModel(
        sample_size=config.image_size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attention)),
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        attention_head_dim=tuple(max(1, width // config.attention_head_dim) for width in config.unet_channels),
        cross_attention_dim=config.text_width,
        norm_num_groups=8,
        # the words, pooled, join the timestep: they reach every level at once, also the one without attention
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    nn.init.zeros_(unet.add_embedding.norm2.weight)  # silent at the start
    return unet


def new_text_encoder(config: BaseModelConfig, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=2 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.text_tokens,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler(config: BaseModelConfig) -> Any:
    """SD 1.5's noise schedule; ``clip_sample`` off, since latents are not bounded by one."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
