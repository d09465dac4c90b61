"""The tiny world's own face recogniser: an ArcFace network small enough to train on a laptop.

Why not only a downloaded one: the embedded world works offline, and its people are drawn, not photographed. The
network takes what insightface hands to any ArcFace model, an aligned RGB crop of 112 × 112 px scaled to [-1, 1], and
answers 512 floats. It halves the crop first, since a 64 px photo has no finer detail to give.

Axes: B batch, C channels, H height, W width, E embedding (512), P people of the training set.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING_SIZE = 512
CROP_SIZE = 112
POOLED_SIZE = 56


@dataclass(frozen=True)
class RecogniserConfig:
    """Shape of the network: "resnet" (recogniser A) has widths, blocks, bottleneck; "patches" (B) the patch_ ones."""

    architecture: str = "resnet"
    widths: tuple[int, int, int] = (32, 64, 128)
    blocks: tuple[int, int, int] = (1, 2, 2)
    bottleneck: int = 32
    patch_widths: tuple[int, int] = (96, 192)
    patch_blocks: tuple[int, int] = (3, 3)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """relu(x + f(x)), two 3 × 3 convolutions, same width and resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(channels, channels, 3, 1)
        self.conv2 = _conv_bn(channels, channels, 3, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(x_BCHW + self.conv2(F.relu(self.conv1(x_BCHW))))


class FaceRecogniser(nn.Module):
    """Convolutional recogniser: a residual trunk of three stages (strides 2, 4, 8 of the halved crop), then 512 floats."""

    def __init__(self, config: RecogniserConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RecogniserConfig()
        widths = config.widths
        self.stem = _conv_bn(3, widths[0], 5, 2)
        self.stage1 = nn.Sequential(*[ResidualBlock(widths[0]) for _ in range(config.blocks[0])])
        self.down2 = _conv_bn(widths[0], widths[1], 3, 2)
        self.stage2 = nn.Sequential(*[ResidualBlock(widths[1]) for _ in range(config.blocks[1])])
        self.down3 = _conv_bn(widths[1], widths[2], 3, 2)
        self.stage3 = nn.Sequential(*[ResidualBlock(widths[2]) for _ in range(config.blocks[2])])
        self.squeeze = _conv_bn(widths[2], config.bottleneck, 1, 1)
        self.dropout = nn.Dropout(0.1)
        self.project = nn.Linear(config.bottleneck * (POOLED_SIZE // 8) ** 2, EMBEDDING_SIZE, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE)

    def features(self, x_B3HW: Tensor) -> list[Tensor]:
        """Feature maps at strides 2, 4 and 8 of the input, for a perceptual loss.

        The trunk is fully convolutional: any height and width of 8 or more will do, aligned or not. It was trained where
        the eyes stand about 18 px apart, close to the 13 px of a 64 px photo. Input: RGB in [-1, 1], never halved here.
        """
        map1 = self.stage1(F.relu(self.stem(x_B3HW)))
        map2 = self.stage2(F.relu(self.down2(map1)))
        map3 = self.stage3(F.relu(self.down3(map2)))
        return [map1, map2, map3]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, 112, 112) or already halved (B, 3, 56, 56), RGB in [-1, 1] -> (B, 512), not normalised."""
        map3 = self.features(halved(x_B3HW))[-1]
        flat = F.relu(self.squeeze(map3)).flatten(1)
        embedding: Tensor = self.norm(self.project(self.dropout(flat)))
        return embedding


def halved(x_B3HW: Tensor) -> Tensor:
    """2 × 2 mean of (B, 3, 112, 112); (B, 3, 56, 56) as it is. Any other shape is a ValueError."""
    size = x_B3HW.shape[-1]
    if x_B3HW.dim() != 4 or x_B3HW.shape[1] != 3 or x_B3HW.shape[-2] != size or size not in (CROP_SIZE, POOLED_SIZE):
        raise ValueError(
            f"A recogniser takes aligned RGB crops (B, 3, 112, 112) or (B, 3, 56, 56) in [-1, 1], got {tuple(x_B3HW.shape)}. "
            "Use insightface.utils.face_align.norm_crop to align a photo, or features() for perceptual maps."
        )
    return F.avg_pool2d(x_B3HW, 2) if size == CROP_SIZE else x_B3HW


class ArcFaceHead(nn.Module):
    """Additive angular margin loss (Deng et al., 2019, arXiv:1801.07698, equation 3).

    loss = -log( e^{s cos(θ_y + m)} / (e^{s cos(θ_y + m)} + Σ_{j≠y} e^{s cos θ_j}) ), θ_j = angle(embedding, centre of j).
    `margin` is an attribute, so that a training can start with 0 and raise it. Where θ_y + m would pass π the target is
    continued linearly, so the loss stays monotonic in θ_y.
    """

    def __init__(self, people: int, scale: float = 32.0, margin: float = 0.4) -> None:
        super().__init__()
        self.centres_PE = nn.Parameter(torch.randn(people, EMBEDDING_SIZE) * 0.05)
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings_BE: Tensor, person_B: Tensor) -> Tensor:
        cosine_BP = F.normalize(embeddings_BE.float()) @ F.normalize(self.centres_PE).T
        target_B = cosine_BP.gather(1, person_B[:, None]).squeeze(1).clamp(-1 + 1e-6, 1 - 1e-6)
        shifted_B = torch.cos(torch.acos(target_B) + self.margin)
        threshold = math.cos(math.pi - self.margin)
        shifted_B = torch.where(target_B > threshold, shifted_B, target_B - self.margin * math.sin(self.margin))
        logits_BP = self.scale * cosine_BP.scatter(1, person_B[:, None], shifted_B[:, None])
        return F.cross_entropy(logits_BP, person_B)
