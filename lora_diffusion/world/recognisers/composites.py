"""Training pictures for the detector: photos scaled and placed on a canvas, with none, one or two faces.

Half are what it will mostly see, one square photo that fills the canvas; the rest teach it small faces, two people, and
places without a face. Boxes and points are px of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
MAX_FACES = 2


@dataclass(frozen=True)
class Labelled:
    """Photos (N, H, W, 3) uint8, five points (N, 5, 2) and face boxes (N, 4), px of the photo."""

    photos: Pixels
    points: Floats
    boxes: Floats


@dataclass(frozen=True)
class Composite:
    """A canvas (S, S, 3) RGB uint8, boxes (F, 4) and points (F, 5, 2) of the F faces on it."""

    canvas: Pixels
    boxes: Floats
    points: Floats


def _without_face(photo: Pixels, box: Floats, size: int, rng: np.random.Generator) -> Pixels:
    """A background: a strip of a photo beside or below the face, stretched; or one colour; or noise; or a gradient."""
    side = photo.shape[0]
    kind = rng.random()
    if kind < 0.55:
        strips = [(0, 0, int(box[0]) - 5, side), (int(box[2]) + 5, 0, side, side), (0, int(box[3]) + 4, side, side)]
        wide = [s for s in strips if s[2] - s[0] >= 6 and s[3] - s[1] >= 6]
        if wide:
            x1, y1, x2, y2 = wide[rng.integers(len(wide))]
            return np.asarray(cv2.resize(photo[y1:y2, x1:x2], (size, size)), dtype=np.uint8)
    if kind < 0.8:
        corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        return np.asarray(cv2.resize(corners, (size, size)), dtype=np.uint8)
    cells = int(rng.integers(2, 24))
    blobs = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    how = cv2.INTER_NEAREST if rng.random() < 0.3 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(blobs, (size, size), interpolation=how), dtype=np.uint8)


def _placed(side: int, size: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners of `count` squares of `side` px; two of them stand beside or above each other, or in a row."""
    free = size - side
    if count < 2:
        return [(int(rng.integers(0, free + 1)), int(rng.integers(0, free + 1))) for _ in range(count)]
    gap = int(rng.integers(side, max(side, free) + 1)) if free >= side else free
    start = int(rng.integers(0, max(0, free - gap) + 1))
    other = [int(rng.integers(0, free + 1)) for _ in range(2)]
    places = [(start, other[0]), (start + gap, other[1])]
    return places if rng.random() < 0.6 else [(y, x) for x, y in places]


def compose(data: Labelled, size: int, rng: np.random.Generator, faces: int | None = None) -> Composite:
    """One canvas. `faces` None draws: 45 % one photo over the whole canvas, 25 % one smaller, 15 % two, 15 % none."""
    plain = faces is None and rng.random() < 0.45
    if faces is None:
        faces = 1 if plain else int(rng.choice([0, 1, 2], p=[0.28, 0.45, 0.27]))
    index = rng.integers(len(data.photos), size=max(1, faces))
    canvas = _without_face(data.photos[index[0]], data.boxes[index[0]], size, rng)
    source = data.photos.shape[1]
    side = size if plain else int(rng.integers(size * 3 // 8, size // 2 + 1 if faces == 2 else size + 1))
    boxes, points = [], []
    for i, (left, top) in zip(index[:faces], _placed(side, size, faces, rng), strict=True):
        how = cv2.INTER_AREA if side < source else cv2.INTER_LINEAR
        canvas[top : top + side, left : left + side] = cv2.resize(data.photos[i], (side, side), interpolation=how)
        scale, shift = side / source, np.array([left, top], np.float32)
        boxes.append(data.boxes[i] * scale + np.tile(shift, 2))
        points.append(data.points[i] * scale + shift)
    canvas = _filmed(canvas, rng)
    shape = (len(boxes), 4), (len(boxes), 5, 2)
    return Composite(
        canvas, np.asarray(boxes, np.float32).reshape(shape[0]), np.asarray(points, np.float32).reshape(shape[1])
    )


def _filmed(canvas: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur, lost colour, light and white balance, noise, as cameras give them."""
    gain = (rng.uniform(0.7, 1.3) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    image = canvas.astype(np.float32)
    if rng.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.15:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    noise = rng.standard_normal(image.shape).astype(np.float32) * np.float32(rng.uniform(0, 6))
    return np.clip(image * gain + np.float32(rng.uniform(-25, 25)) + noise, 0, 255).astype(np.uint8)
