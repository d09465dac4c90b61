"""Light on surfaces: the equations that turn colour, normal and light into what the camera sees.

P pixels; everything is linear light in the camera's coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.body import Body
from lora_diffusion.world.people.hair import BEARD, BUN, FLYAWAY
from lora_diffusion.world.people.head import head_model
from lora_diffusion.world.people.maths import (
    Array,
    basis_towards,
    dot,
    f32,
    linear_rgb,
    mix,
    normalise,
    rotation,
    smoothstep,
)
from lora_diffusion.world.people.raster import lit_fraction, noise, rasterise
from lora_diffusion.world.people.views import LIGHTS, View

SHADOW_MAP = 128  # texels on a side
SHADOW_SPAN = 4.2  # head units that the shadow map covers
SUBSURFACE = np.array([0.28, 0.12, 0.08], f32)  # skin lets light through: red wraps furthest round the edge


@dataclass(frozen=True, eq=False)
class Light:
    """The light of one view, in the camera's coordinates, with its shadow map."""

    direction: Array  # (3,) towards the light
    key: Array  # (3,) colour times strength
    ambient: Array  # (3,) likewise
    depth: Array  # (SHADOW_MAP, SHADOW_MAP)

    def reaches(self, points: Array, bias: float) -> Array:
        """Fraction 0..1 of the key light that reaches points (P, 3)."""
        return lit_fraction(_light_space(points, basis_towards(self.direction)), self.depth, bias, 1.6)


def set_up_light(view: View, backdrop: Array, casters: list[tuple[Array, Array]]) -> Light:
    """The view's light, its ambient part tinted by the backdrop; ``casters``: (points, triangles) that cast shadows."""
    setup = LIGHTS[view.light]
    azimuth = math.radians(setup.azimuth + view.light_jit[0])
    elevation = math.radians(setup.elevation + view.light_jit[1])
    direction = np.array(
        [math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)], f32
    )
    around = backdrop.mean((0, 1))
    tint = 0.75 + 0.25 * around / (around.mean() + 1e-3) * np.clip(around.mean() / 0.3, 0.5, 1.3)
    depth = np.zeros((SHADOW_MAP, SHADOW_MAP), f32)
    basis = basis_towards(direction)
    for points, triangles in casters:
        rasterise(_light_space(points, basis), triangles, depth)
    return Light(
        direction=direction,
        key=np.array(setup.key_colour, f32) * setup.key,
        ambient=np.array(setup.ambient_colour, f32) * setup.ambient * tint,
        depth=depth,
    )


def _light_space(points: Array, basis: Array) -> Array:
    """Camera coordinates (P, 3) to shadow-map texels and depth; the map is centred on the chin."""
    q = (points - np.array([0, -0.3, 0], f32)) @ basis.T
    scale = SHADOW_MAP / SHADOW_SPAN
    centre = SHADOW_MAP / 2
    return np.stack([centre + q[:, 0] * scale, centre - q[:, 1] * scale, q[:, 2] + 20], 1).astype(f32)


@dataclass(eq=False)
class Surface:
    """Visible pixels of solid things (skin, eyes, glasses...)."""

    colour: Array  # (P, 3)
    normals: Array  # (P, 3) unit
    to_camera: Array  # (P, 3) unit
    positions: Array  # (P, 3)
    openness: Array  # (P,) ambient occlusion, 1 open
    gloss: Array  # (P,) strength of the highlight
    sharpness: Array  # (P,) exponent of the highlight
    is_skin: Array  # (P,) float32 0 or 1


def shade_surface(s: Surface, light: Light) -> Array:
    """Blinn-Phong with wrapped diffuse light for skin, hemispheric ambient light and a Fresnel rim; (P, 3) float32."""
    n, lit = s.normals, light.reaches(s.positions, bias=0.06)
    facing = n @ light.direction
    wrap = s.is_skin[:, None] * SUBSURFACE
    diffuse = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, 1) ** 1.1
    shadow = lit[:, None] ** (1 - s.is_skin[:, None] * np.array([0.30, 0.08, 0], f32))  # reddish shadow edges
    from_below = np.clip(-n[:, 1], 0, 1)[:, None] * np.array([0.10, 0.06, 0.04], f32)
    dome = (0.62 + 0.38 * n[:, 1])[:, None] * np.array([1, 1, 1], f32) + from_below
    fill_direction = normalise(np.array([-light.direction[0] * 0.8, 0.1, 0.9], f32))
    fill = np.clip(n @ fill_direction, 0, 1)[:, None] * 0.30
    occlusion = s.openness[:, None] ** np.array([0.85, 1.1, 1.2], f32)
    colour = s.colour * (light.key * diffuse * shadow * 1.15 + light.ambient * (dome + fill) * occlusion * 1.25)

    half_way = normalise(light.direction + s.to_camera)
    towards_half = np.clip(dot(n, half_way), 0, 1)
    towards_camera = np.clip(dot(n, s.to_camera), 0, 1)
    fresnel = 0.35 + 0.65 * (1 - towards_camera) ** 4
    lobe = s.gloss * (towards_half**s.sharpness) * (s.sharpness + 8) / 40
    highlight = lobe * fresnel * (facing > 0) * lit
    rim = s.gloss * (1 - towards_camera) ** 5 * s.openness * 0.35
    colour += highlight[:, None] * light.key * 0.55 + rim[:, None] * light.ambient
    return colour.astype(f32)


def eye_colours(body: Body, outwards: Array, gaze: Array) -> Array:
    """White, iris, dark limbus and pupil of an eye that looks along ``gaze`` (3,); ``outwards`` (P, 3) unit normals."""
    angle = np.degrees(np.arccos(np.clip(outwards @ gaze, -1, 1)))  # from the middle of the pupil
    colour = np.full((len(outwards), 3), 1, f32) * linear_rgb([0.97, 0.95, 0.94])
    colour *= (1 - 0.25 * smoothstep(30, 75, angle))[:, None] * np.array([1, 0.96, 0.95], f32)
    in_iris = smoothstep(30.5, 27.5, angle)[:, None]
    in_pupil = smoothstep(13, 10, angle)[:, None]
    limbus = smoothstep(21, 29, angle)[:, None]
    iris = body.palette.iris * (1.15 - 0.65 * limbus) * (1 + 0.25 * smoothstep(20, 12, angle))[:, None]
    colour = colour * (1 - in_iris) + iris * in_iris
    return colour * (1 - in_pupil) + 0.012 * in_pupil


def gaze_direction(view: View, to_camera: Array, convergence: float) -> Array:
    """Where an eye looks (3,), camera coordinates; ``to_camera``: rotation (3, 3) of the head seen by the camera."""
    across, up = view.gaze
    turned: Array = to_camera @ rotation(across + convergence, -up, 0) @ np.array([0, 0, 1], f32)
    return turned


@dataclass(eq=False)
class StrandSurface:
    """Visible pixels of hair and beard."""

    normals: Array  # (P, 3) unit, towards the camera
    positions: Array  # (P, 3)
    to_camera: Array  # (P, 3)
    attributes: Array  # (P, 4) as in HairMesh
    from_inside: Array  # (P,) bool: the inner side of the hull, seen through an opening


def strand_coordinates(body: Body, attributes: Array) -> tuple[Array, Array]:
    """Where in the noise volume each point's strand lies (P, 3), and how frayed the hair's edge is there (P,)."""
    p, curl = body.traits, body.traits.curl
    phi, y, kind = attributes[:, 0], attributes[:, 1], attributes[:, 3]
    beard = (kind > BEARD - 0.5) & (kind < BEARD + 0.5)
    # Dense round the head, drawn out along the strand: streaks, or with curls, spots.
    across, along = mix(14.0, 15.0, curl), mix(1.0, 13.0, curl)
    q = np.stack([np.sin(phi) * across + p.part * 3, y * along, np.cos(phi) * across], 1)
    q[beard] = np.stack([phi[beard] * 26, y[beard] * 11, np.full(beard.sum(), 2)], 1)
    q += p.tex
    frayed = mix(0.03, 0.10, smoothstep(0.1, 0.5, p.hair_len)) + 0.05 * curl
    frayed = np.where(beard, 0.30, np.where(kind > FLYAWAY - 0.5, 1, np.where(kind > BUN - 0.5, 0, frayed)))
    return q.astype(f32), frayed.astype(f32)


def shade_strands(body: Body, s: StrandSurface, light: Light, head_up: Array) -> tuple[Array, Array]:
    """Hair by Kajiya and Kay (1989), two highlights; ``head_up`` (3,): where the crown points.

    Returns colour (P, 3) and opacity (P,), float32.
    """
    p, palette, volume, curl = body.traits, body.palette, head_model().noise_volume, body.traits.curl
    phi, y, field, kind = s.attributes.T
    beard = (kind > BEARD - 0.5) & (kind < BEARD + 0.5)
    hair = (kind < 0.5) | (kind > FLYAWAY - 0.5)

    q, _ = strand_coordinates(body, s.attributes)
    streaks = 0.6 * noise(q, volume) + 0.4 * noise(q * 2.3 + 7, volume)
    wide = np.stack([np.sin(phi) * 4.5, y * 3.5, np.cos(phi) * 4.5], 1).astype(f32)
    locks = noise(wide * (1 + curl) + p.tex * 2, volume)

    opacity = np.ones(len(field), f32)
    opacity[beard] = np.clip(smoothstep(0.0, 0.45, field[beard] + 0.20 * streaks[beard]), 0.35, 1)
    opacity[hair] = np.where(s.from_inside[hair], 1, smoothstep(-0.02, 0.05, field[hair] + 0.03))
    opacity[kind > BUN - 0.5] = 1  # buns and flyaways
    opacity[hair] *= np.clip(0.62 + 8 * p.hair_len, 0, 1)  # the scalp shows through a buzz cut

    colour = palette.hair * (1 + 0.34 * streaks + 0.12 * locks)[:, None]
    colour[beard] = (palette.hair * 0.55 + palette.brows * 0.45) * (1 + 0.35 * streaks[beard])[:, None]
    if 0.10 < p.grey < 0.95:
        grey = smoothstep(0.15, 0.45, streaks) * 0.5 * p.grey**1.5
        colour = colour * (1 - grey[:, None]) + 0.45 * grey[:, None]
    colour = np.clip(colour, 0.004, 1)

    # Strands run down along the surface; streaks and locks tilt the normal.
    n = s.normals
    tangent = normalise(-head_up - n * (n @ -head_up)[:, None] * 1.0 + 1e-4)
    sideways = np.cross(n, tangent)
    n = n + sideways * (streaks * (0.45 + 0.5 * curl))[:, None] + tangent * (locks * (0.22 + 0.30 * curl))[:, None]
    n = normalise(n)
    facing = n @ light.direction
    diffuse = np.clip((facing + 0.25) / 1.25, 0, 1)
    half_way = normalise(light.direction + s.to_camera)
    along = dot(tangent, half_way) + 0.12 * streaks
    sheen = mix(0.9, 0.25, curl)
    awake = np.clip(facing + 0.3, 0, 1)
    white = (np.sqrt(np.clip(1 - along * along, 0, 1)) ** 60) * 0.22 * sheen * awake
    tinted = (np.sqrt(np.clip(1 - (along - 0.15) ** 2, 0, 1)) ** 18) * 0.16 * sheen * awake

    occlusion = np.clip(0.50 + 0.35 * streaks + 0.25 * np.clip(n[:, 1], -1, 1), 0.12, 1.15)
    occlusion = occlusion * np.where(s.from_inside, 0.35, 1)
    occlusion = occlusion * np.where(hair, smoothstep(4.5, 7.6, y) * 0.45 + 0.6, 1)
    lit = (0.25 + 0.75 * light.reaches(s.positions, bias=0.10)) * np.where(s.from_inside, 0.25, 1)
    dome = 0.60 + 0.40 * n[:, 1]
    brightest = colour.max(1, keepdims=True)
    out = colour * (light.key * (diffuse * lit)[:, None] * 1.15 + light.ambient * (dome * occlusion)[:, None] * 1.35)
    out = out + (white * lit)[:, None] * light.key * np.clip(0.18 + 1.6 * colour, 0, 1)
    glint = (tinted * lit)[:, None] * light.key * colour / (brightest + 0.02) * np.clip(brightest * 2.5 + 0.1, 0, 1)
    return (out + glint).astype(f32), opacity.astype(f32)
