"""A whole StableDiffusionPipeline with random weights and a vocabulary of letters: nothing to download."""

import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from tiny_unet import tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Draws 16 x 16 pixels; silent."""
    tokens = [
        *string.ascii_lowercase,
        *(f"{c}</w>" for c in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    unet = tiny_unet(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """One image (3, 16, 16) in [0, 1], the same each time, with classifier-free guidance (two samples a step)."""
    generator = torch.Generator().manual_seed(7)
    prompt = "sks person"
    return pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images[0]
