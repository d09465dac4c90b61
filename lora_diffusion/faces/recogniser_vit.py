"""Recogniser B: a small vision transformer, the second opinion.

It conditions nothing and chooses nothing; it only scores. So that it does not share recogniser A's blind spots, it has
another architecture, other training people and other weights. Axes: B batch, T tokens (49), D width, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_diffusion.faces.recogniser import EMBEDDING_SIZE, RecogniserConfig, halved

GRID = 7


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP of twice the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        tokens, dim = x_BTD.shape[1], x_BTD.shape[2]
        qkv = self.qkv(self.norm1(x_BTD)).reshape(-1, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, tokens, dim)
        x = x_BTD + self.out(mixed)
        answer: Tensor = x + self.mlp(self.norm2(x))
        return answer


class VitRecogniser(nn.Module):
    """Two strided convolutions, 7 × 7 tokens, transformer, all tokens to 512 floats. Same input and output as A."""

    def __init__(self, config: RecogniserConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RecogniserConfig(architecture="vit")
        dim = config.dim
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4, bias=False), nn.BatchNorm2d(32), nn.GELU(),
            nn.Conv2d(32, 96, 3, 1, 1, bias=False), nn.BatchNorm2d(96), nn.GELU(),
            nn.Conv2d(96, dim, 2, 2),
        )  # fmt: skip
        self.position_TD = nn.Parameter(torch.randn(GRID * GRID, dim) * 0.02)
        self.blocks = nn.ModuleList([TransformerBlock(dim, config.heads) for _ in range(config.depth)])
        self.final = nn.LayerNorm(dim)
        self.squeeze = nn.Linear(dim, 16)
        self.project = nn.Linear(16 * GRID * GRID, EMBEDDING_SIZE, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, 112, 112) or (B, 3, 56, 56), RGB in [-1, 1] -> (B, 512), not normalised."""
        x_BTD = self.stem(halved(x_B3HW)).flatten(2).transpose(1, 2) + self.position_TD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        embedding: Tensor = self.norm(self.project(F.gelu(self.squeeze(self.final(x_BTD))).flatten(1)))
        return embedding
