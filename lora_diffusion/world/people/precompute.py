"""What the renderer needs to know about the mean head and need not find out again: hair's hull and ambient occlusion.

Run once by ``jobs/world/build_head_model.py``, which stores the results beside the mesh. Takes some seconds.
"""

from __future__ import annotations

import math

import numpy as np

from lora_diffusion.world.people.head import SKIN, SKULL_Y, SKULL_Z, TEETH, TONGUE, MorphableHead
from lora_diffusion.world.people.maths import Array, basis_towards, f32, grid_triangles, normalise, smoothstep
from lora_diffusion.world.people.raster import rasterise, vertex_normals

ANGLES, UPPER_ROWS, LOWER_ROWS = 72, 15, 16  # the hull's grid: crown to forehead, then down to the shoulders
NECK_TOP, HULL_BOTTOM = 6.0, 4.7
NEIGHBOURS, NEIGHBOUR_RADIUS = 12, 0.18


def ambient_occlusion(head: MorphableHead, size: int = 160, directions: int = 90) -> Array:
    """Fraction of the sky that each vertex sees, cosine-weighted; (V,) float32.

    The head is rasterised from ``directions`` sides into depth maps of ``size`` pixels, as for shadows.
    """
    mean, triangles = head.mean, head.triangles
    normals = np.empty_like(mean)
    vertex_normals(mean, triangles, normals)
    i = np.arange(directions) + 0.5  # a Fibonacci sphere
    polar, around = np.arccos(1 - 2 * i / directions), np.pi * (1 + 5**0.5) * i
    sky = np.stack([np.cos(around) * np.sin(polar), np.sin(around) * np.sin(polar), np.cos(polar)], 1)
    seen, possible = np.zeros(len(mean)), np.zeros(len(mean))
    for direction in sky:
        q = (mean - [0, 6.6, 0.4]) @ basis_towards(direction).T
        points = np.stack([size / 2 + q[:, 0] * size / 6.5, size / 2 - q[:, 1] * size / 6.5, q[:, 2] + 20], 1).astype(
            f32
        )
        depth = np.zeros((size, size), f32)
        rasterise(points, triangles, depth)
        facing = normals @ direction
        x, y = np.clip(points[:, 0].astype(int), 0, size - 1), np.clip(points[:, 1].astype(int), 0, size - 1)
        weight = np.clip(facing, 0, 1)
        seen += weight * ((points[:, 2] > depth[y, x] - 0.05) & (facing > 0))
        possible += weight
    openness = np.clip(seen / (possible + 1e-6), 0, 1).astype(f32)
    openness[head.vertex_materials == TEETH] = 0.55
    openness[head.vertex_materials == TONGUE] = 0.4
    mouth = head.inside_mouth > 0.5
    openness[mouth] = np.maximum(openness[mouth], 0.18)
    return openness


def hair_hull(head: MorphableHead) -> dict[str, Array]:
    """The hull's arrays by their names in the model file; see HeadModel for their meaning."""
    phi = (np.arange(ANGLES) / ANGLES) * 2 * np.pi - np.pi
    origins, directions = _rays(phi)
    # `radius` reaches the skin, bridged over ears; `hanging` is where long hair falls: down from the widest ring.
    radius = _bridge_gaps(_cast_all(head, origins, directions))
    skin = np.where(np.isnan(radius), 0.5, radius)
    hanging = _let_hang(radius, origins, phi)
    for row in range(1, len(skin)):
        hanging[row], skin[row] = _smooth_round(hanging[row]), _smooth_round(skin[row])
    points = origins + directions * skin[..., None]
    neighbours, weights = _attach(head, points.reshape(-1, 3))
    return {
        "hull_phi": np.tile(phi, (len(points), 1)).astype(f32),
        "hull_points": points.astype(f32),
        "hull_directions": directions.astype(f32),
        "hull_clearance": (hanging - skin).astype(f32),
        "hull_height": points[..., 1].astype(f32),
        "hull_neighbours": neighbours.astype(np.int32),
        "hull_neighbour_weights": weights.astype(f32),
        "hull_triangles": grid_triangles(*points.shape[:2]).astype(np.int32),
    }


def _rays(phi: Array) -> tuple[Array, Array]:
    """Origins and unit directions (R, F, 3): a fan from the skull's centre over the top, a comb down its axis below."""
    equator = np.stack([np.sin(phi), 0 * phi, np.cos(phi)], 1)
    tilt = math.radians(28)  # the crown lies behind the highest point
    crown = np.array([0, math.cos(tilt), -math.sin(tilt)])
    origins, directions = [], []
    for s in np.linspace(0.0, 1, UPPER_ROWS):  # spherical interpolation from the crown to the equator
        arc = np.arccos(np.clip(equator @ crown, -1, 1))[:, None]
        directions.append(normalise((np.sin((1 - s) * arc) * crown + np.sin(s * arc) * equator) / np.sin(arc)))
        origins.append(np.tile([0, SKULL_Y, SKULL_Z], (ANGLES, 1)))
    for y in np.linspace(SKULL_Y, HULL_BOTTOM, LOWER_ROWS + 1)[1:]:
        directions.append(equator)
        origins.append(np.tile([0, y, SKULL_Z], (ANGLES, 1)))
    return np.array(origins), np.array(directions)


def _cast_all(head: MorphableHead, origins: Array, directions: Array) -> Array:
    """Distance (R, F) along each ray to the outermost skin without ears; NaN where it meets none."""
    ear = head.ears > 0.05
    corners = head.mean[head.triangles]
    scalp = (head.triangle_materials == SKIN) & ~ear[head.triangles].any(1) & (corners[:, :, 1].min(1) > 5.9)
    a, b, c = (corners[scalp][:, i].astype(np.float64) for i in range(3))
    edge1, edge2 = b - a, c - a

    def cast(origin: Array, direction: Array) -> float:  # Möller and Trumbore (1997), all triangles at once
        h = np.cross(direction, edge2)
        determinant = (edge1 * h).sum(1)
        determinant = np.where(abs(determinant) < 1e-12, 1e-12, determinant)
        s = origin - a
        u = (s * h).sum(1) / determinant
        q = np.cross(s, edge1)
        v = (q @ direction) / determinant
        t = (edge2 * q).sum(1) / determinant
        hit = (u >= -1e-6) & (v >= -1e-6) & (u + v <= 1 + 1e-6) & (t > 0.05)
        return float(t[hit].max()) if hit.any() else math.nan

    radius = np.full(origins.shape[:2], np.nan)
    for i, j in np.ndindex(*radius.shape):
        if origins[i, 0, 1] >= NECK_TOP:
            radius[i, j] = cast(origins[i, j], directions[i, j])
    return radius


def _bridge_gaps(radius: Array) -> Array:
    """Fills holes within a ring (the ears' places) from both sides."""
    x = np.arange(ANGLES)
    for ring in radius:
        gap = np.isnan(ring)
        if gap.any() and not gap.all():
            ring[gap] = np.interp(x[gap], x[~gap], ring[~gap], period=ANGLES)
    return radius


def _let_hang(radius: Array, origins: Array, phi: Array) -> Array:
    """Sides and back fall from the widest ring and narrow a little; in front the hull keeps to the skin."""
    hanging = radius.copy()
    widest = radius[UPPER_ROWS - 1].copy()
    side = smoothstep(50, 80, np.degrees(abs(phi)))
    for row in range(UPPER_ROWS, len(radius)):
        drop = np.clip((SKULL_Y - origins[row, 0, 1]) / 1.3, 0, 1)
        falling = widest * (1 - 0.10 * drop)
        skin = np.where(np.isnan(radius[row]), 0, radius[row])
        at_side = np.maximum(skin, falling * side + skin * (1 - side))
        hanging[row] = np.where(side > 0, at_side, np.maximum(skin, 0.75))
    return hanging


def _smooth_round(ring: Array) -> Array:
    kernel = np.array([1, 2, 3, 2, 1.0]) / 9
    return np.convolve(np.concatenate([ring[-2:], ring, ring[:2]]), kernel, "valid")


def _attach(head: MorphableHead, points: Array) -> tuple[Array, Array]:
    """The nearest skin vertices of each hull point and their Gaussian weights; (P, NEIGHBOURS) both."""
    scalp = head.is_skin & (head.ears <= 0.05) & (head.mean[:, 1] > 5.9) & (head.inside_mouth < 0.1)
    candidates = np.nonzero(scalp)[0]
    squared = ((points[:, None] - head.mean[candidates][None]) ** 2).sum(-1)
    nearest = np.argpartition(squared, NEIGHBOURS, 1)[:, :NEIGHBOURS]
    near = np.take_along_axis(squared, nearest, 1)
    scale = 2 * NEIGHBOUR_RADIUS**2
    weights = np.exp(-near / scale + near.min(1, keepdims=True) / scale)
    return candidates[nearest], weights / weights.sum(1, keepdims=True)
