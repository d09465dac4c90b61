"""The detector's looks at a photo: as it is, closer at a small face, with a margin, at parts of it, turned.

A detector answers worst where it was not trained: faces that are small on its canvas, fill it, or lie on their side. A
face on its side may even get the points of an upright one, so what a doubtful look saw has to compete with other looks.

Coordinates are px of the photo as it came, (x, y). Axes: P points of a face (5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.crops import CROP_SIZE, TEMPLATE, alignment, placed

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Window: TypeAlias = tuple[float, float, float, float]
"""x1 y1 x2 y2; may reach over the photo's border."""

SMALL = 0.5
"""A face below this share of what was looked at is looked at again, closer: its points lie within a px or two of the canvas."""
CLOSE = 1.7
"""Side of a closer look, in heights of the face: as much of the canvas as the face of a portrait takes."""
MARGIN = 0.3
GREY = (110, 110, 110)
BORDER = (40, 18, 24, 18)
"""px of the crop of 112 px from the face's points to the photo's border at the face's top, right, bottom and left. Of 5 % of
whole faces they are within 64, 30, 38 and 30; of half of those of which a fifth is cut, within 27, 13, 21 and 13."""
MOST_ROLL = 55.0
MOST_MISFIT = 16.0
"""Degrees, and px of the crop of 112 px (root mean square), by which an upright face's points differ from ArcFace's template
at most. A face turned by 65 degrees differs by 13 px."""


@dataclass(frozen=True)
class Sighting:
    """A face that a look saw. box x1 y1 x2 y2, points (5, 2), score 0..1; whether its points can be a face's that is upright
    in the photo as it was looked at."""

    box: Floats
    points: Floats
    score: float
    upright: bool = True

    @property
    def side(self) -> float:
        """The shorter side of the box, px."""
        return float((self.box[2:] - self.box[:2]).min())

    @property
    def extent(self) -> float:
        """The longer side of the box, px."""
        return float((self.box[2:] - self.box[:2]).max())

    @property
    def roll(self) -> float:
        """Degrees that the face is turned clockwise in the photo, -180..180, as its points say."""
        transform = alignment(self.points[None])[0]
        return -math.degrees(math.atan2(transform[1, 0], transform[0, 0]))


def can_be_upright(box: Floats, points: Floats) -> bool:
    """Whether the points can be an upright face's: eyes above the mouth, in proportion, in the box."""
    roll = Sighting(box, points, 0.0).roll
    misfit = math.sqrt(float(((placed(points) - TEMPLATE) ** 2).sum(1).mean()))
    margin = 0.15 * float((box[2:] - box[:2]).max())
    inside = (points >= box[:2] - margin) & (points <= box[2:] + margin)
    return abs(roll) <= MOST_ROLL and misfit <= MOST_MISFIT and bool(inside.all())


def is_cut_off(points: Floats, shape: Sequence[int], quarters: int) -> bool:
    """Whether the photo's border runs through the face: too near to one of its points. quarters: turns to bring it upright."""
    scale = math.hypot(*alignment(points[None])[0][0, :2])
    height, width = shape[:2]
    (left, top), (right, bottom) = points.min(0), [width, height] - points.max(0)
    sides = np.roll([top, right, bottom, left], -quarters)  # as the face has them
    return bool((sides * scale < BORDER).any())


def share_outside(points: Floats, shape: Sequence[int]) -> float:
    """Of the aligned crop of a face with these five points: how much of it lies beyond the photo's border, 0..1."""
    grid = (np.arange(16) + 0.5) * CROP_SIZE / 16
    transform = alignment(points[None])[0]
    x, y = np.stack(np.meshgrid(grid, grid)).reshape(2, -1) - transform[:, 2:]
    a, b = transform[0, 0], transform[1, 0]  # of a similarity [[a, -b], [b, a]], turned back
    photo_x, photo_y = (a * x + b * y) / (a * a + b * b), (a * y - b * x) / (a * a + b * b)
    inside = (photo_x >= 0) & (photo_x < shape[1]) & (photo_y >= 0) & (photo_y < shape[0])
    return 1 - float(inside.mean())


class Detector:
    """insightface's detector, with a canvas of `side` px."""

    def __init__(self, model: Any, side: int) -> None:
        self._model, self._side = model, side

    def look(self, photo_HW3: Pixels, window: Window | None = None) -> list[Sighting]:
        """Faces in the window of a BGR photo, or in all of it; largest first."""
        height, width = photo_HW3.shape[:2]
        x1, y1, x2, y2 = (round(v) for v in window) if window else (0, 0, width, height)
        view = photo_HW3[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
        borders = (max(-y1, 0), max(y2 - height, 0), max(-x1, 0), max(x2 - width, 0))
        # What lies far below the canvas' resolution is averaged; the detector's own resizing would skip over it.
        scale = min(1.0, 2 * self._side / max(x2 - x1, y2 - y1))
        if scale < 1:
            size = max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale))
            view = np.asarray(cv2.resize(view, size, interpolation=cv2.INTER_AREA), np.uint8)
        if any(borders):
            top, bottom, left, right = (round(border * scale) for border in borders)
            framed = cv2.copyMakeBorder(view, top, bottom, left, right, cv2.BORDER_CONSTANT, value=GREY)
            view = np.asarray(framed, np.uint8)
        boxes, points = self._model.detect(np.ascontiguousarray(view))
        corner = np.array([x1, y1], np.float32)
        found = [
            Sighting(
                box[:4] / scale + np.tile(corner, 2),
                five / scale + corner,
                float(box[4]),
                can_be_upright(box[:4], five),
            )
            for box, five in zip(boxes, points, strict=True)
        ]
        return sorted(found, key=lambda seen: -float(np.prod(seen.box[2:] - seen.box[:2])))

    def look_closely(self, photo_HW3: Pixels, window: Window | None = None) -> list[Sighting]:
        """As `look`, and again at a crop around each face that is small; as it was where the crop does not show it."""
        height, width = photo_HW3.shape[:2]
        whole = max(window[2] - window[0], window[3] - window[1]) if window else max(height, width)
        seen = self.look(photo_HW3, window)
        return [self._closer(photo_HW3, face) if face.extent < SMALL * whole else face for face in seen]

    def _closer(self, photo_HW3: Pixels, face: Sighting) -> Sighting:
        centre, half = (face.box[:2] + face.box[2:]) / 2, CLOSE * face.extent / 2
        (x1, y1), (x2, y2) = (centre - half).tolist(), (centre + half).tolist()
        near = [other for other in self.look(photo_HW3, (x1, y1, x2, y2)) if overlap(other.box, face.box) > 0.2]
        return max(near, key=lambda other: overlap(other.box, face.box), default=face)

    def look_turned(self, photo_HW3: Pixels, degrees: float) -> list[Sighting]:
        """Faces that the photo shows after a turn counterclockwise."""
        height, width = photo_HW3.shape[:2]
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
        spread = np.abs(turn[:, :2]) @ [width, height]
        turn[:, 2] += (spread - [width, height]) / 2
        size = (round(spread[0]), round(spread[1]))
        turned = np.asarray(cv2.warpAffine(photo_HW3, turn, size, borderValue=GREY), np.uint8)
        back = np.asarray(cv2.invertAffineTransform(turn), np.float64)
        found = []
        for face in self.look_closely(turned):
            centre, half = (
                _moved(np.asarray((face.box[None, :2] + face.box[None, 2:]) / 2, np.float32), back)[0],
                (face.box[2:] - face.box[:2]) / 2,
            )
            half = half[::-1] if round(degrees / 90) % 2 else half
            box = np.concatenate([centre - half, centre + half])
            found.append(Sighting(box, _moved(face.points, back), face.score, face.upright))
        return found


def _moved(points_P2: Floats, transform: NDArray[np.float64]) -> Floats:
    return np.asarray(points_P2 @ transform[:, :2].T + transform[:, 2], np.float32)


def with_margin(shape: Sequence[int]) -> Window:
    """A square around the whole photo, and a margin."""
    height, width = shape[:2]
    half = (0.5 + MARGIN) * max(height, width)
    return (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)


def squares(shape: Sequence[int], share: float) -> list[Window]:
    """Squares of a share of the shorter side that cover the photo, each neighbour sharing at least half."""
    height, width = shape[:2]
    side = share * min(height, width)
    return [(x, y, x + side, y + side) for y in _steps(height, side) for x in _steps(width, side)]


def _steps(length: float, side: float) -> list[float]:
    count = math.ceil(2 * (length - side) / side) + 1 if length > side else 1
    return [float(v) for v in np.linspace(0, length - side, count)]


def overlap(a_4: Floats, b_4: Floats) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(a_4[:2], b_4[:2]), np.minimum(a_4[2:], b_4[2:])
    shared = float(np.prod((high - low).clip(0)))
    both = float(np.prod(a_4[2:] - a_4[:2]) + np.prod(b_4[2:] - b_4[:2]))
    return shared / max(both - shared, 1e-9)
