"""Recogniser B, the second opinion: patches, depthwise mixing and MLPs instead of residual 3 × 3 convolutions.

It conditions nothing and chooses nothing; it only scores. So that it does not share recogniser A's blind spots, it has
another architecture (a MetaFormer, Yu et al., 2022, arXiv:2111.11418: a token mixer and an MLP in each block, after a
stem of patches that do not overlap), other training people and other weights. Axes: B batch, C, H, W, E embedding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lora_diffusion.world.recognisers.network import EMBEDDING_SIZE, POOLED_SIZE, RecogniserConfig, halved


class MixerBlock(nn.Module):
    """x + depthwise 3 × 3 (norm(x)), then x + MLP(norm(x)) over the channels, three times as wide inside."""

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.contract = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = x_BCHW + self.mix(self.norm1(x_BCHW))
        answer: Tensor = x + self.contract(F.relu(self.expand(self.norm2(x))))
        return answer


class PatchRecogniser(nn.Module):
    """Patches of 4 × 4 px of the halved crop (14 × 14 of them), mixed; joined by 2 × 2, mixed; then 512 floats."""

    def __init__(self, config: RecogniserConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RecogniserConfig(architecture="patches")
        fine, coarse = config.patch_widths
        self.patches = nn.Conv2d(3, fine, 4, 4)
        self.fine = nn.Sequential(*[MixerBlock(fine) for _ in range(config.patch_blocks[0])])
        self.join = nn.Sequential(nn.BatchNorm2d(fine), nn.Conv2d(fine, coarse, 2, 2))
        self.coarse = nn.Sequential(*[MixerBlock(coarse) for _ in range(config.patch_blocks[1])])
        self.squeeze = nn.Sequential(nn.BatchNorm2d(coarse), nn.Conv2d(coarse, 24, 1), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.project = nn.Linear(24 * (POOLED_SIZE // 8) ** 2, EMBEDDING_SIZE, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, 112, 112) or (B, 3, 56, 56), RGB in [-1, 1] -> (B, 512), not normalised."""
        x = self.fine(self.patches(halved(x_B3HW)))
        x = self.squeeze(self.coarse(self.join(x)))
        embedding: Tensor = self.norm(self.project(self.dropout(x.flatten(1))))
        return embedding
