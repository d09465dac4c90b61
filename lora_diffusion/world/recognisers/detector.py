"""A tiny face detector with the outputs of SCRFD, so that insightface runs it as it runs `buffalo_l`'s.

SCRFD (Guo et al., 2021, arXiv:2105.04714) answers, for the strides 8, 16 and 32 and 2 anchors at each cell, a score,
four distances to the sides of the box and five landmarks, in units of the stride. A portrait world needs one stride:
faces are 20 to 110 px of a 128 px canvas. Here stride 16 does the work, from a trunk that sees the whole canvas; the
strides 8 and 32 and the second anchor always answer a score of 0. They exist for the sake of the format.

Axes: B batch, A anchors = cells × 2, cells row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 16
SPREAD = 4.0
"""The head answers distances in units of SPREAD strides, so that its targets are near 1."""


@dataclass(frozen=True)
class DetectorConfig:
    """Channels after each halving of the canvas: strides 2 (after 2 × 2 pooling: 4), 8, 16, and of the context layers."""

    widths: tuple[int, int, int] = (16, 32, 56)
    context: int = 3


def _block(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class FaceDetector(nn.Module):
    """(B, 3, H, W), RGB (x - 127.5) / 128, H and W multiples of 32 -> maps at stride 16: (B, 1 + 4 + 10, H/16, W/16)."""

    def __init__(self, config: DetectorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DetectorConfig()
        w4, w8, w16 = config.widths
        self.stem = nn.Sequential(_block(3, w4, 2), _block(w4, w8, 2), _block(w8, w8))
        self.deep = nn.Sequential(_block(w8, w16, 2), _block(w16, w16))
        self.to16 = _block(w16, w16, 1)
        # Dilated layers see the whole face, also one that fills the canvas.
        self.context = nn.Sequential(*[_block(w16, w16, 1, 1 + i % 2) for i in range(config.context)])
        self.head = nn.Conv2d(w16, 15, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        x = self.deep(self.stem(F.avg_pool2d(x_B3HW, 2)))
        x = self.context(x) + self.to16(x)
        maps: Tensor = self.head(x)
        return maps


class ScrfdOutputs(nn.Module):
    """The detector with SCRFD's nine outputs: scores of strides 8, 16, 32, then boxes, then landmarks."""

    def __init__(self, detector: FaceDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x_13HW: Tensor) -> tuple[Tensor, ...]:
        maps = self.detector(x_13HW)
        scores, boxes, points = maps[:, :1].sigmoid(), maps[:, 1:5].clamp(min=0) * SPREAD, maps[:, 5:] * SPREAD
        at16 = [self._both_anchors(scores, empty=True), self._both_anchors(boxes), self._both_anchors(points)]
        answers: list[Tensor] = []
        for kind, channels in enumerate((1, 4, 10)):
            zeros = x_13HW[:, :1] * 0.0
            at8 = F.avg_pool2d(zeros, 8).flatten(1).repeat(1, 2 * channels).reshape(-1, channels)
            at32 = F.avg_pool2d(zeros, 32).flatten(1).repeat(1, 2 * channels).reshape(-1, channels)
            answers += [at8, at16[kind], at32]
        return tuple(answers)

    @staticmethod
    def _both_anchors(maps_1CHW: Tensor, empty: bool = False) -> Tensor:
        """(cells × 2, C): the cell's answer for its first anchor, the same, or nothing, for its second."""
        first = maps_1CHW.flatten(2).permute(0, 2, 1)
        second = first * 0.0 if empty else first
        return torch.stack([first, second], 2).reshape(-1, first.shape[-1])


def targets(
    boxes_BF4: Tensor, points_BF52: Tensor, present_BF: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells answer for which face: (score (B, H, W), box and points (B, 14, H, W), weight (B, H, W)).

    A face belongs to the cells whose centre, the point (x · 16, y · 16), lies in the middle of its box (within a
    quarter of its sides, at least one stride); cells between the middle and the border of the box count for neither.
    """
    ys = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width) * STRIDE
    xs = torch.arange(width, dtype=torch.float32)[None].expand(height, width) * STRIDE
    batch, faces = present_BF.shape
    score, weight = torch.zeros(batch, height, width), torch.ones(batch, height, width)
    values = torch.zeros(batch, 14, height, width)
    for face in range(faces):
        x1, y1, x2, y2 = (boxes_BF4[:, face, i, None, None] for i in range(4))
        here = present_BF[:, face, None, None]
        across = ((xs - (x1 + x2) / 2) / ((x2 - x1) * 0.25).clamp(min=9.0)).abs()
        down = ((ys - (y1 + y2) / 2) / ((y2 - y1) * 0.25).clamp(min=9.0)).abs()
        inner, outer = (torch.maximum(across, down) <= 1) & here, (torch.maximum(across, down) <= 1.9) & here
        points = points_BF52[:, face].flatten(1)[:, :, None, None]
        offsets = [xs - x1, ys - y1, x2 - xs, y2 - ys]
        offsets += [points[:, i] - (xs if i % 2 == 0 else ys) for i in range(10)]
        answer = torch.stack([o.expand(batch, height, width) for o in offsets], 1) / (STRIDE * SPREAD)
        values = torch.where(inner[:, None], answer, values)
        weight = torch.where(outer & ~inner & (score == 0), torch.zeros(()), weight)
        weight = torch.where(inner, torch.ones(()), weight)
        score = torch.where(inner, torch.ones(()), score)
    return score, values, weight


def detection_loss(maps_BCHW: Tensor, score_BHW: Tensor, values_BCHW: Tensor, weight_BHW: Tensor) -> Tensor:
    """Binary cross entropy of the scores, smooth L1 of boxes and points where a face answers (points count most: alignment hangs on them)."""
    entropy = F.binary_cross_entropy_with_logits(maps_BCHW[:, 0], score_BHW, weight_BHW, reduction="sum")
    error = F.smooth_l1_loss(maps_BCHW[:, 1:], values_BCHW, beta=0.02, reduction="none") * score_BHW[:, None]
    found = score_BHW.sum().clamp(min=1)
    return (entropy + 2 * error[:, :4].sum() / 4 + 20 * error[:, 4:].sum() / 10) / found
