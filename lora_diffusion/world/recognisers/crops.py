"""Aligned face crops for training a recogniser, and their augmentation.

A recogniser must know a face through other light, lens, compression, hair and background, so crops are changed in all
of these at random. They are never mirrored: a face is not its mirror image, and identity here is exact.

Axes: B batch, N photos, H, W. Coordinates are pixels, (x, y); five points in ArcFace's order (eye, eye, nose, mouth
corner, mouth corner; the image's left first).
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lora_diffusion.faces.crops import CROP_SIZE, alignment

Pixels = NDArray[np.uint8]


def aligned_crops(
    photos_NHWC: Pixels,
    points_N52: NDArray[np.float32],
    rng: np.random.Generator | None = None,
    jitter: float = 0.0,
    jpeg_share: float = 0.0,
) -> Pixels:
    """Crops of 112 × 112 px, halved to (N, 56, 56, 3): what a recogniser sees after its first pooling.

    `jitter` is the standard deviation (px of the photo) of noise on the five points, as a detector would make it;
    `jpeg_share` of the photos go through JPEG first, quality 30 to 95.
    """
    rng = rng or np.random.default_rng(0)
    points = points_N52 + jitter * rng.standard_normal(points_N52.shape).astype(np.float32)
    transforms = alignment(points)
    crops = np.empty((len(photos_NHWC), CROP_SIZE // 2, CROP_SIZE // 2, 3), np.uint8)
    for i, (photo, transform) in enumerate(zip(photos_NHWC, transforms, strict=True)):
        if jpeg_share and rng.random() < jpeg_share:
            _, data = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 96))])
            photo = cv2.imdecode(data, cv2.IMREAD_COLOR)
        crop = cv2.warpAffine(photo, transform, (CROP_SIZE, CROP_SIZE), borderValue=0.0)
        crops[i] = cv2.resize(crop, (CROP_SIZE // 2, CROP_SIZE // 2), interpolation=cv2.INTER_AREA)
    return crops


def to_input(crops_NHWC: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], insightface's normalisation, channels last in memory."""
    return (torch.from_numpy(np.ascontiguousarray(crops_NHWC)).permute(0, 3, 1, 2).float() - 127.5) / 127.5


def _chance(batch: int, share: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(batch, generator=generator) < share).float()[:, None, None, None]


def _face_mask(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Soft ellipse (B, 1, H, W), 1 on eyes, nose, mouth and chin of an aligned crop, 0 on hair and background."""
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    scale = 0.8 + 0.3 * torch.rand(batch, 1, 1, generator=generator)
    distance = torch.hypot((xs - 0.5 * size) / (0.34 * size), (ys - 0.62 * size) / (0.44 * size)) / scale
    return ((1.15 - distance) / 0.25).clamp(0, 1)[:, None]


def augment(crops_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Random light, colour, blur, noise, small shift and scale, cut-outs, and other people's hair and background."""
    batch, _, size, _ = crops_B3HW.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    # Hair and background of another person, so that the face itself must carry the identity.
    mask = _face_mask(batch, size, generator)
    other = crops_B3HW[torch.randperm(batch, generator=generator)]
    swap = _chance(batch, 0.4, generator) * (1 - mask)
    x = crops_B3HW * (1 - swap) + other * swap

    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.94, 1.06)
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.06, 0.06), uniform(-0.06, 0.06)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (soft - x) * _chance(batch, 0.4, generator) * uniform(0.2, 1.0, 1, 1, 1)
    coarse = F.interpolate(F.avg_pool2d(x, 2), size=(size, size), mode="bilinear", align_corners=False)
    x = x + (coarse - x) * _chance(batch, 0.15, generator)

    grey = x.mean(1, keepdim=True)
    saturation = torch.where(_chance(batch, 0.08, generator) > 0, torch.zeros(()), uniform(0.6, 1.4, 1, 1, 1))
    x = grey + (x - grey) * saturation
    x = x * uniform(0.75, 1.3, 1, 1, 1) * uniform(0.93, 1.07, 3, 1, 1) + uniform(-0.15, 0.15, 1, 1, 1)
    x = x + torch.randn(x.shape, generator=generator) * uniform(0.0, 0.05, 1, 1, 1)

    # A cut-out: a rectangle of one colour over up to a third of each side.
    ys, xs = torch.arange(size)[None, :, None], torch.arange(size)[None, None, :]
    top, left = uniform(0, size, 1, 1), uniform(0, size, 1, 1)
    high, wide = uniform(4, size / 3, 1, 1), uniform(4, size / 3, 1, 1)
    inside = ((ys >= top) & (ys < top + high) & (xs >= left) & (xs < left + wide)).float()[:, None]
    inside = inside * _chance(batch, 0.3, generator)
    return (x * (1 - inside) + uniform(-1, 1, 3, 1, 1) * inside).clamp(-1, 1)
