"""From five points of a face to the crop that a recogniser sees.

Axes: N faces. Coordinates are pixels, (x, y); five points in ArcFace's order (eye, eye, nose, mouth corner, mouth
corner; the image's left first).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

CROP_SIZE = 112
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""(5, 2): where a crop of 112 px has the five points; `insightface.utils.face_align.arcface_dst`, which is slow to import."""


def alignment(points_N52: Floats, size: int = CROP_SIZE) -> NDArray[np.float64]:
    """(N, 2, 3) similarity transforms that bring five points to ArcFace's template, in the least-squares sense.

    The closed form of Umeyama (1991), for all N at once; equals `insightface.utils.face_align.estimate_norm`.
    """
    points = points_N52.astype(np.float64)
    target = TEMPLATE.astype(np.float64) * (size / CROP_SIZE)
    centre_N2, target_centre = points.mean(1), target.mean(0)
    p, q = points - centre_N2[:, None], target - target_centre
    # In the plane a similarity is a complex number a + ib: minimise |q - (a + ib) p|².
    weight_N = (p**2).sum((1, 2))
    a = (p * q).sum((1, 2)) / weight_N
    b = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / weight_N
    rotation = np.stack([np.stack([a, -b], -1), np.stack([b, a], -1)], 1)
    shift = target_centre - np.einsum("nij,nj->ni", rotation, centre_N2)
    return np.concatenate([rotation, shift[..., None]], 2)


def aligned_crop(pixels_HW3: Pixels, points_52: Floats) -> Pixels:
    """(112, 112, 3): the face turned and scaled to ArcFace's template; black beyond the photo's border."""
    crop = cv2.warpAffine(pixels_HW3, alignment(points_52[None])[0], (CROP_SIZE, CROP_SIZE), borderValue=0.0)
    return np.asarray(crop, np.uint8)


def placed(points_52: Floats) -> Floats:
    """The points as they lie in the aligned crop."""
    transform = alignment(points_52[None])[0]
    return np.asarray(points_52 @ transform[:, :2].T + transform[:, 2], np.float32)
