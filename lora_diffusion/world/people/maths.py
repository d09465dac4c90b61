"""Small mathematics that every part of the renderer shares. Scalars may be numpy or Python; arrays keep their dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
f32 = np.float32


def smoothstep(low: float, high: float, x: Any) -> Any:
    """0 up to ``low``, 1 from ``high`` on, a cubic between; with ``low > high`` it falls instead of rising."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def mix(a: Any, b: Any, t: Any) -> Any:
    """``a`` at t = 0, ``b`` at t = 1."""
    return a + (b - a) * t


def linear_rgb(srgb: Any) -> Array:
    """Display colour (0..1, gamma 2.2) to light (float32)."""
    return np.asarray(srgb, f32) ** f32(2.2)


def dot(a: Any, b: Any) -> Any:
    """Scalar products of 3-vectors along the last axis. Written out: numpy's sums over so short an axis are slow."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def normalise(vectors: Array) -> Array:
    """Unit vectors along the last axis, which has length 3."""
    unit: Array = vectors / (np.sqrt(dot(vectors, vectors))[..., None] + 1e-9)
    return unit


def colour_ramp(x: float, stops: Sequence[tuple[float, tuple[float, float, float]]]) -> Array:
    """Piecewise linear colour at ``x`` through ``(position, rgb)`` stops; (3,) float64."""
    positions = [position for position, _ in stops]
    colours = np.asarray([colour for _, colour in stops], float)
    return np.array([np.interp(x, positions, colours[:, channel]) for channel in range(3)])


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """Rotation matrix (3, 3) from degrees; y is up, z comes out of the face, positive yaw turns to +x."""
    a, b, c = np.radians([yaw, pitch, roll])
    about_y = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    about_z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return (about_y @ about_x @ about_z).astype(f32)


def basis_towards(direction: Array) -> Array:
    """Orthonormal rows (3, 3): right, up, and ``direction`` itself; an orthographic camera that looks along it."""
    direction = direction / np.linalg.norm(direction)
    up = np.array([0, 1, 0]) if abs(direction[1]) < 0.95 else np.array([0, 0, 1.0])
    right = np.cross(up, direction)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(direction, right), direction]).astype(f32)


def grid_triangles(rows: int, columns: int, closed_rows: bool = False) -> Array:
    """Two triangles for each cell of a (rows, columns) grid of points that closes round its columns; (T, 3) indices.

    ``closed_rows`` joins the last row to the first as well (a torus).
    """
    index = np.arange(rows * columns).reshape(rows, columns)
    here, below = (index, np.roll(index, -1, 0)) if closed_rows else (index[:-1], index[1:])
    here_next, below_next = np.roll(here, -1, 1), np.roll(below, -1, 1)
    return np.concatenate(
        [
            np.stack([here, below, below_next], -1).reshape(-1, 3),
            np.stack([here, below_next, here_next], -1).reshape(-1, 3),
        ]
    )
