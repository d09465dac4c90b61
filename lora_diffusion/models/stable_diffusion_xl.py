"""Stable Diffusion XL: two text encoders, a summary of the prompt and the size of the picture as further conditions.

Axes: B batch, C latent channels, H/W latent cells, S token positions, D width of both text encoders together, P width of the
prompt's summary (the pooled embedding of the second encoder).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.models.clip_tokenizer import tokens


def encode(base: Any, texts: list[str]) -> Tensor:
    """(B, S + 1, D): of each token what the last layers but one say, side by side; last the summary, filled up with zeros."""
    ids = (tokens(tokenizer, texts).to(base.device) for tokenizer in (base.tokenizer, base.tokenizer_2))
    first = base.text_encoder(next(ids), output_hidden_states=True)
    second = base.text_encoder_2(next(ids), output_hidden_states=True)
    tokens_BSD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).float()
    summary_BP = second.text_embeds.float()
    summary_BD = F.pad(summary_BP, (0, tokens_BSD.shape[-1] - summary_BP.shape[-1]))
    rows = torch.cat([tokens_BSD, summary_BD[:, None]], 1)
    if base.force_zeros_for_empty_prompt:
        rows[[i for i, text in enumerate(texts) if not text]] = 0
    return rows


def conditioning(base: Any, text_BSD: Tensor, latents_BCHW: Tensor) -> dict[str, Any]:
    """Photos count as taken in the size that they are drawn in, uncropped, as diffusers' pipeline draws them."""
    height, width = (side * base.pixels_per_cell for side in latents_BCHW.shape[-2:])
    numbers_6 = torch.tensor([height, width, 0, 0, height, width], dtype=text_BSD.dtype, device=text_BSD.device)
    summary_BP = text_BSD[:, -1, : base.text_encoder_2.config.projection_dim]
    added = {"text_embeds": summary_BP, "time_ids": numbers_6.expand(len(text_BSD), -1)}
    return {"encoder_hidden_states": text_BSD[:, :-1], "added_cond_kwargs": added}
