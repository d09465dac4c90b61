"""A StableDiffusionXLPipeline of SDXL's blocks with random weights, narrow: nothing to download."""

import string

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_diffusion.models.clip_tokenizer import clip_tokenizer

LETTERS = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]


def tiny_xl(seed: int = 0, words: bool = False) -> StableDiffusionXLPipeline:
    """Draws 32 x 32 pixels; silent. words: with the vocabulary of CLIP instead of one of letters."""
    torch.manual_seed(seed)
    if words:
        tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!")]
    else:
        numbers = {token: i for i, token in enumerate(LETTERS)}
        tokenizers = [
            CLIPTokenizer(numbers, merges=[], model_max_length=32, pad_token=pad) for pad in ("<|endoftext|>", "a")
        ]
    text = {
        "vocab_size": len(tokenizers[0]),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "max_position_embeddings": tokenizers[0].model_max_length,
        "projection_dim": 24,
        "bos_token_id": len(tokenizers[0]) - 2,
        "eos_token_id": len(tokenizers[0]) - 1,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 1, 1),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu")).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
