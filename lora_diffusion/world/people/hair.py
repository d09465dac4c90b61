"""Hair: a hull of strands round the head, cut along a hairline and a tip line, with flyaways and, for some, a bun.

The hull is a grid of points (R rows from crown to shoulder, F angles) that stands off the skin by the thickness of the
hair. A scalar field over it says where hair is: positive inside, zero at the hairline and at the tips. The rasteriser
frays the zero line into strands (raster.rasterise).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.head import head_model
from lora_diffusion.world.people.maths import Array, f32, grid_triangles, mix, smoothstep
from lora_diffusion.world.people.raster import noise
from lora_diffusion.world.people.traits import Traits

# What a point of a strand mesh belongs to (column 3 of its attributes).
HAIR, BEARD, BUN, FLYAWAY = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class HairMesh:
    """Hair of one person in the neutral pose; P points."""

    points: Array  # (P, 3) float32
    triangles: Array  # (., 3) int32
    attributes: Array  # (P, 4): angle phi (radians, 0 in front), template height y, field, kind
    head_share: Array  # (P,) 1 turns with the head, 0 lies on the shoulders


def hair_field(traits: Traits, phi: Array, y: Array) -> tuple[Array, Array]:
    """(field, hairline) at angle ``phi`` (radians, 0 in front) and template height ``y``, any shape.

    The field is y minus the height of the tips: positive where hair is. The hairline is a template height.
    """
    p = traits
    degrees = np.degrees(phi)
    off_front = abs(degrees)
    angles = np.array([0, 22, 40, 55, 68, 78, 90, 103, 118, 140, 180.0])
    heights = np.array([8.00, 7.99, 7.92, 7.70, 7.36, 6.98, 7.28, 7.22, 6.80, 6.52, 6.42])
    heights[:3] += p.hairline * np.array([1, 1, 0.9])
    heights[1:4] += p.temple * np.array([0.25, 0.9, 0.6])
    heights[5] += 0.22 * (1 - p.side)  # sideburns
    heights[8:] += 0.12 * (1 - p.side)
    hairline = np.interp(off_front, angles, heights)

    # The fringe hangs over the forehead, slanted along the parting.
    fringe = p.fringe * smoothstep(0.06, 0.2, p.hair_len + 0.12) * (1 - p.bald)
    slant = 0.0045 * degrees * p.part * 1.1
    fringe_tip = 7.60 - 0.10 * smoothstep(0.3, 0.9, fringe) + 0.22 * (1 - smoothstep(0.2, 0.8, fringe)) + slant
    hanging = np.minimum(hairline, fringe_tip + 0.012 * np.maximum(off_front - 30, 0))
    front = mix(hairline, hanging, smoothstep(0.02, 0.35, fringe) * smoothstep(68, 50, off_front))

    # Sides and back hang down to the length, unless tied up.
    loose = 1 - p.bun
    long = smoothstep(0.28, 0.95, p.hair_len) * loose
    end = mix(hairline, mix(6.75, 5.0, long**1.2), smoothstep(0.22, 0.42, p.hair_len * loose))
    end = np.minimum(end, hairline)
    opening = mix(66, 56, smoothstep(0.4, 0.9, p.hair_vol) * p.side)  # degrees: where the face ends, the sides begin
    tip = mix(front, end, smoothstep(opening - 9, opening + 11, off_front))

    if p.bald > 0:  # a horse-shoe is left
        return np.minimum(y - tip, mix(8.6, 7.62, p.bald) - y), hairline
    return y - tip, hairline


def build_hair(vertices: Array, traits: Traits) -> HairMesh | None:
    """Hair on the head ``vertices`` (V, 3); None for whoever has none."""
    if traits.hair_len <= 0.004:
        return None
    head = head_model()
    # The hull follows the person's head: each of its points moves like the skin near it.
    moved = (vertices - head.mean)[head.hull_neighbours]
    hull = head.hull_points + (moved * head.hull_neighbour_weights[..., None]).sum(1).reshape(head.hull_points.shape)

    phi, y = head.hull_phi, head.hull_height
    field, hairline = hair_field(traits, phi, y)
    coarse, fine = _lumps(traits, phi, y)
    thickness = _thickness(traits, phi, y, field, hairline, coarse, fine)
    grid = hull + head.hull_directions * np.maximum(thickness, 0.010)[..., None]
    hangs = smoothstep(7.2, 5.6, y) * smoothstep(0.3, 0.6, traits.hair_len)
    grid[..., 0] += hangs * (0.05 * np.sin(y * 5 + phi * 3) * (0.3 + traits.curl)) * np.sign(np.sin(phi))  # waves

    flat_field = field.reshape(-1).astype(f32)
    attributes = np.stack([phi.reshape(-1), y.reshape(-1), flat_field, np.full(phi.size, HAIR)], 1).astype(f32)
    near_hair = (flat_field[head.hull_triangles] > -0.12).any(1)
    mesh = HairMesh(
        points=grid.reshape(-1, 3).astype(f32),
        triangles=head.hull_triangles[near_hair],
        attributes=attributes,
        head_share=smoothstep(5.4, 6.6, y).reshape(-1).astype(f32),
    )
    if traits.hair_len > 0.05:
        lengthy = smoothstep(0.03, 0.30, traits.hair_len)
        lift = (0.018 + 0.05 * lengthy * (0.5 + traits.curl)) * smoothstep(-0.05, 0.25, field)
        outer = grid + head.hull_directions * (lift * (1 + 0.6 * fine))[..., None]
        mesh = _with_flyaways(mesh, outer.reshape(-1, 3).astype(f32))
    if traits.bun > 0.02:
        mesh = _with_bun(mesh, traits, crown=hull[0].mean(0))
    return mesh


def _lumps(traits: Traits, phi: Array, y: Array) -> tuple[Array, Array]:
    """Two octaves of noise over the hull, finer for curls; each of phi's shape."""
    volume, tex, curl = head_model().noise_volume, traits.tex, traits.curl
    q = np.stack([np.sin(phi) * 2.2, y * 1.7, np.cos(phi) * 2.2], -1).reshape(-1, 3).astype(f32)
    coarse = noise(q * (1 + 1.2 * curl) + tex * 2 + 11, volume).reshape(phi.shape)
    fine = noise(q * (2.2 + 2.2 * curl) + 5 - tex, volume).reshape(phi.shape)
    return coarse, fine


def _thickness(
    traits: Traits, phi: Array, y: Array, field: Array, hairline: Array, coarse: Array, fine: Array
) -> Array:
    """How far the hair stands off the hull, (R, F), head units."""
    p, curl, length = traits, traits.curl, traits.hair_len
    head = head_model()
    off_front = np.degrees(abs(phi))
    top = np.clip((y - 7.6) / 0.75, 0, 1)
    volume = mix(0.5, 1.3, p.hair_vol)
    lengthy = smoothstep(0.03, 0.30, length)
    # Thickness grows from the hairline, slowly over a bare forehead.
    body = smoothstep(0, mix(0.28, 0.50, smoothstep(70, 30, off_front) * (1 - p.fringe)), field)
    over_temples = 0.05 * np.exp(-(((y - 7.88) / 0.27) ** 2)) * smoothstep(35, 75, off_front)
    t = 0.018 + 0.03 * lengthy
    t = t + body * lengthy * volume * (0.045 * top + 0.05 * p.side * (1 - top) + over_temples + 0.05)
    long = body * smoothstep(0.2, 0.6, length) * (1 - p.bun)
    t = t + long * volume * 0.07 * (1 - top) * smoothstep(50, 90, off_front)
    quiff = smoothstep(65, 15, off_front) * smoothstep(7.85, 8.2, y) * smoothstep(0.04, 0.2, length)
    t = t + quiff * body * (0.12 * smoothstep(0.4, 0.95, p.quiff) * (1 - p.fringe) + 0.01)
    afro = curl * smoothstep(0.45, 0.9, curl) * smoothstep(0.05, 0.5, length)
    t = t + 0.30 * afro * body * (1 - p.bun) * smoothstep(6.3, 7.0, y)
    # the groove of the parting
    x, z = head.hull_points[..., 0], head.hull_points[..., 2]
    groove = 0.55 * smoothstep(0.25, 0.6, length) * np.exp(-(((x - 0.28 * p.part) / 0.06) ** 2))
    t = t * (1 - groove * smoothstep(7.9, 8.15, y) * smoothstep(-0.3, 0.2, z))
    t = t * (1 + (0.14 + 0.30 * curl) * coarse + (0.08 + 0.36 * curl) * fine) + body * curl * 0.05 * fine * lengthy
    return t * mix(0.35, 1, smoothstep(-0.02, 0.14, field)) + head.hull_clearance * smoothstep(0.0, 0.30, hairline - y)


def _with_flyaways(mesh: HairMesh, points: Array) -> HairMesh:
    """Adds a second, outer shell of which only single strands are drawn: hair has no outline cut with scissors."""
    attributes = mesh.attributes.copy()
    attributes[:, 2] = -0.16 - 5 * np.maximum(
        0, 0.10 - attributes[:, 2]
    )  # below zero: noise alone lets strands through
    attributes[:, 3] = FLYAWAY
    return _joined(mesh, HairMesh(points, mesh.triangles, attributes, mesh.head_share))


def _with_bun(mesh: HairMesh, traits: Traits, crown: Array) -> HairMesh:
    """Adds a lumpy ball of hair on the crown."""
    columns, rows = 20, 12
    around, down = np.meshgrid(np.linspace(0, 2 * np.pi, columns, endpoint=False), np.linspace(0, np.pi, rows))
    direction = np.stack([np.sin(down) * np.cos(around), np.cos(down), np.sin(down) * np.sin(around)], -1).reshape(
        -1, 3
    )
    lumps = noise((direction * 2.5 + traits.tex).astype(f32), head_model().noise_volume)
    radius = (0.20 + 0.12 * traits.hair_vol) * traits.bun * (1 + 0.10 * lumps)
    centre = crown + np.array([0, 0.22 * traits.bun, mix(-0.15, 0.12, traits.quiff)])
    count = rows * columns
    height = 8.3 + 0.2 * np.cos(down.ravel()) + 0.1 * np.sin(around.ravel())
    bun = HairMesh(
        points=(centre + direction * radius[:, None]).astype(f32),
        triangles=grid_triangles(rows, columns),
        attributes=np.stack([around.ravel(), height, np.ones(count), np.full(count, BUN)], 1).astype(f32),
        head_share=np.ones(count, f32),
    )
    return _joined(mesh, bun)


def _joined(a: HairMesh, b: HairMesh) -> HairMesh:
    return HairMesh(
        points=np.concatenate([a.points, b.points]),
        triangles=np.concatenate([a.triangles, b.triangles + len(a.points)]).astype(np.int32),
        attributes=np.concatenate([a.attributes, b.attributes]),
        head_share=np.concatenate([a.head_share, b.head_share]),
    )
