"""Glasses and clothes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.head import head_model
from lora_diffusion.world.people.maths import Array, f32, grid_triangles, linear_rgb, mix, normalise, smoothstep
from lora_diffusion.world.people.traits import Traits

BLACK_FRAME, BROWN_FRAME, SILVER_FRAME = (
    np.array([0.03, 0.03, 0.035]),
    np.array([0.30, 0.16, 0.07]),
    np.array([0.62, 0.60, 0.56]),
)


@dataclass(frozen=True, eq=False)
class GlassesMesh:
    """Frames without lenses, in the person's neutral pose."""

    points: Array  # (P, 3) float32
    triangles: Array  # (., 3) int32
    colour: Array  # (3,) linear


def build_glasses(vertices: Array, traits: Traits) -> GlassesMesh:
    """The glasses that fit this head (V, 3), whether the person wears them or not."""
    head = head_model()
    left_eye, right_eye = vertices[head.left_eye], vertices[head.right_eye]
    left, right = left_eye.mean(0), right_eye.mean(0)
    eye_distance = left[0] - right[0]
    front = max(left_eye[:, 2].max(), right_eye[:, 2].max()) + 0.17
    half_width = 0.205 * traits.gl_size * (eye_distance / 0.577)
    half_height = mix(0.125, 0.19, traits.gl_round) * traits.gl_size
    roundness = mix(0.55, 1.0, traits.gl_round)  # exponent of the superellipse: 1 is an ellipse, less is squarer
    radius = mix(0.014, 0.034, traits.gl_thick)

    tubes = []
    angle = np.arange(26) * 2 * np.pi / 26
    cosine, sine = np.cos(angle), np.sin(angle)
    for centre, side in ((left, 1), (right, -1)):
        middle = centre[0] + side * 0.01
        x = middle + half_width * np.sign(cosine) * abs(cosine) ** roundness
        y = centre[1] - 0.02 + half_height * np.sign(sine) * abs(sine) ** roundness
        z = front - 0.10 * abs(middle + half_width * cosine) ** 2 / 0.25 * 0.6  # wrapped round the face
        tubes.append(_tube(np.stack([x, y, z], 1), radius, closed=True))
    inner = left[0] + 0.01 - half_width
    x = np.linspace(-inner, inner, 7)
    bridge = np.stack([x, left[1] + 0.03 + 0.03 * np.cos(x / inner * 1.5), np.full(7, front + 0.015)], 1)
    tubes.append(_tube(bridge, radius, closed=False))
    outer = left[0] + 0.01 + half_width
    ear = np.float64(np.percentile(abs(vertices[head.ears > 0.5][:, 0]), 30))
    for side in (1, -1):
        x = side * mix(outer, ear + 0.03, smoothstep(0, 0.45, np.linspace(0, 1, 9)))
        temple = np.stack([x, np.full(9, left[1] + 0.03), np.linspace(front - 0.10, 0.50, 9)], 1)
        tubes.append(_tube(temple, radius, closed=False))

    starts = np.cumsum([0] + [len(points) for points, _ in tubes])
    colour = mix(BLACK_FRAME, BROWN_FRAME, smoothstep(0.5, 0.7, traits.gl_col))
    colour = mix(colour, SILVER_FRAME, smoothstep(0.8, 0.9, traits.gl_col))
    return GlassesMesh(
        points=np.concatenate([points for points, _ in tubes]).astype(f32),
        triangles=np.concatenate([start + t for start, (_, t) in zip(starts[:-1], tubes, strict=True)]).astype(
            np.int32
        ),
        colour=linear_rgb(colour),
    )


def _tube(line: Array, radius: float, closed: bool, sides: int = 5) -> tuple[Array, Array]:
    """Points and triangles of a tube round a line of points (n, 3)."""
    tangent = np.roll(line, -1, 0) - np.roll(line, 1, 0)
    if not closed:
        tangent[0] = line[1] - line[0]
        tangent[-1] = line[-1] - line[-2]
    tangent = normalise(tangent)
    up = np.array([0, 0, 1.0]) if closed else np.array([0, 1.0, 0])
    a = normalise(np.cross(tangent, up) + 1e-6)
    b = np.cross(tangent, a)
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.cos(angle)[None, :, None] * a[:, None] + np.sin(angle)[None, :, None] * b[:, None]
    points = (line[:, None] + radius * ring).reshape(-1, 3)
    return points, grid_triangles(len(line), sides, closed_rows=closed)


def cloth_mask(template: Array, neck: str) -> Array:
    """1 where the body is under cloth, 0 where skin shows, at template points (P, 3); ``neck``: one of NECKLINES."""
    x, y, z = abs(template[:, 0]), template[:, 1], template[:, 2]
    if neck == "crew neck":
        border = 5.86 + 0.12 * smoothstep(0.3, -0.2, z) - 0.10 * smoothstep(0.5, 0.9, z)
    elif neck == "v-neck":
        border = 5.86 + 0.12 * smoothstep(0.3, -0.2, z) - np.maximum(0, 0.75 - 1.6 * x) * smoothstep(0.35, 0.6, z)
    elif neck == "high collar":
        border = np.full_like(x, 6.12)
    else:
        border = 6.02 + 0.08 * smoothstep(0.3, -0.2, z) - np.maximum(0, 0.45 - 2.2 * x) * smoothstep(0.4, 0.6, z)
    mask: Array = smoothstep(-0.015, 0.015, border - y)
    return mask
