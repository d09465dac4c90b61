"""The skin: base colours per vertex, and everything painted per pixel: brows, freckles, stubble, wrinkles, cloth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.accessories import cloth_mask
from lora_diffusion.world.people.body import Body
from lora_diffusion.world.people.facial_hair import beard_density, beard_zones
from lora_diffusion.world.people.hair import hair_field
from lora_diffusion.world.people.head import SKULL_Z, head_model
from lora_diffusion.world.people.maths import Array, f32, linear_rgb, normalise, smoothstep
from lora_diffusion.world.people.raster import noise
from lora_diffusion.world.people.traits import Traits
from lora_diffusion.world.people.views import CLOTH_COLOURS, View

# How much of red, green and blue each thing swallows where it is fully there.
FRECKLE_STAIN = np.array([0.30, 0.45, 0.5], f32)
MOLE_STAIN = np.array([0.5, 0.65, 0.7], f32)
EYE_SHADOW_STAIN = np.array([0.55, 0.75, 0.6], f32)
MOLE_PLACES = ((0.33, 6.75), (-0.27, 6.95), (-0.18, 6.42))  # template x, y


@dataclass(eq=False)
class SkinPixels:
    """The pixels of one picture that show skin (or cloth, which is painted on the same mesh); painted in place."""

    template: Array  # (P, 3) where on the mean head each pixel lies
    lips: Array  # (P,) 0..1
    colour: Array  # (P, 3) linear
    normals: Array  # (P, 3) towards the camera's coordinates
    gloss: Array  # (P,) strength of the highlight
    sharpness: Array  # (P,) exponent of the highlight

    def __post_init__(self) -> None:
        self.x, self.y, self.z = self.template[:, 0], self.template[:, 1], self.template[:, 2]
        self.off_middle = abs(self.x)

    def stain(self, amount: Array, swallowed: Array) -> None:
        self.colour *= 1 - amount[:, None] * swallowed

    def cover(self, opacity: Array, colour: Array) -> None:
        opacity = opacity[:, None]
        self.colour[:] = self.colour * (1 - opacity) + colour * opacity


def paint_skin(skin: SkinPixels, body: Body, view: View, stubble: float) -> None:
    """Paints everything that lies on the skin, bottom to top; ``stubble``: of this view, 0..1."""
    traits, volume = body.traits, head_model().noise_volume
    pores = noise(skin.template * 9 + traits.tex * 3, volume)
    grain = noise(skin.template * 26 + traits.tex, volume)
    skin.colour *= (1 + 0.035 * pores + 0.03 * grain)[:, None]
    _paint_marks(skin, traits, volume)
    _paint_brows(skin, body, volume)
    if traits.makeup > 0.02:
        ellipse = np.hypot((skin.off_middle - 0.288) / 0.19, (skin.y - 7.33) / 0.085)
        lids = 0.45 * traits.makeup * smoothstep(1.1, 0.7, ellipse) * (skin.z > 1) * smoothstep(7.26, 7.30, skin.y)
        skin.stain(lids, EYE_SHADOW_STAIN)
    if stubble > 0.03 or body.beard is not None:
        _paint_stubble(skin, body, stubble, volume)
    _paint_scalp(skin, body)
    if traits.age > 0.15:
        _bend_wrinkles(skin, traits, volume)
    cloth = _paint_cloth(skin, view, volume)
    _set_gloss(skin, traits, pores, cloth)


def _paint_marks(skin: SkinPixels, traits: Traits, volume: Array) -> None:
    if traits.freckle > 0.02:
        dots = smoothstep(0.42, 0.62, noise(skin.template * 24 + traits.tex * 5 + 3, volume))
        dots = dots * smoothstep(0.75, 0.3, abs(skin.y - 7.0)) * smoothstep(1.0, 1.2, skin.z)  # across nose and cheeks
        skin.stain(dots * traits.freckle, FRECKLE_STAIN)
    for i, (x, y) in enumerate(MOLE_PLACES):
        if traits.moles[i] > 0:
            x, y = x + 0.06 * traits.tex[i % 3], y + 0.05 * traits.tex[(i + 1) % 3]
            distance = np.hypot(skin.x - x, skin.y - y)
            skin.stain(traits.moles[i] * smoothstep(0.026, 0.012, distance) * (skin.z > 1), MOLE_STAIN)


def _paint_brows(skin: SkinPixels, body: Body, volume: Array) -> None:
    p, x, y = body.traits, skin.x, skin.y
    along = np.clip((skin.off_middle - p.brow_gap) / (p.brow_len - p.brow_gap), -0.2, 1.2)  # 0 inner end, 1 outer end
    arch = np.float64(p.brow_arch) * (1 - ((along - 0.54) / 0.66) ** 2)
    middle = 7.455 + p.brow_y + arch - 0.012 - 0.03 * smoothstep(0.75, 1.05, along)
    thickness = np.float64(p.brow_thick) * (1.05 - 0.62 * np.clip(along, 0, 1.2) ** 1.5)
    hairs = noise(np.stack([x * 14 + y * 9, y * 6 - x * 2, np.full_like(x, 3)], 1).astype(f32) + p.tex, volume)
    distance = abs(y - middle + 0.010 * hairs) / np.maximum(thickness, 0.004)
    shape = smoothstep(1.15, 0.55, distance) * smoothstep(-0.06, 0.08, along) * smoothstep(1.06, 0.9, along)
    opacity = shape * (skin.z > 0.9) * p.brow_dark * (0.86 + 0.24 * hairs)
    skin.cover(np.clip(opacity, 0, 0.96), body.palette.brows)


def _paint_stubble(skin: SkinPixels, body: Body, stubble: float, volume: Array) -> None:
    """Stubble, and the skin's shade under a beard."""
    zones = beard_zones(skin.template)
    off_lips = 1 - smoothstep(0.2, 0.5, skin.lips)
    zone = np.maximum(np.maximum(zones[0], zones[1]), zones[2]) * off_lips
    dots = smoothstep(-0.5, 0.6, noise(skin.template * 48 + 9, volume))
    short = zone * stubble * (0.28 + 0.34 * dots)
    grown = beard_density(body.traits, zones) * off_lips * 0.85
    skin.cover(np.clip(np.maximum(short * 0.75, grown), 0, 0.95), body.palette.brows * 0.8 + 0.012)


def _paint_scalp(skin: SkinPixels, body: Body) -> None:
    """Skin darkens under hair, also where strands are few: at the hairline, and all over where hair is very short."""
    phi = np.arctan2(skin.x, skin.z - SKULL_Z)
    field, _ = hair_field(body.traits, phi, skin.y)
    over_neck = smoothstep(6.3, 6.6, skin.y)
    density = np.clip(0.35 + 5 * body.traits.hair_len, 0, 0.9)
    ear = (skin.off_middle > 0.70) & (abs(skin.y - 7.08) < 0.34) & (abs(skin.z - 0.48) < 0.24)
    skin.cover(smoothstep(-0.02, 0.10, field) * over_neck * density * ~ear, body.palette.hair * 0.8)


def _bend_wrinkles(skin: SkinPixels, traits: Traits, volume: Array) -> None:
    """Wrinkles of the forehead and crow's feet, as bent normals."""
    depth = smoothstep(0.15, 0.8, traits.age)
    y, off_middle = skin.y, skin.off_middle
    forehead = smoothstep(7.55, 7.7, y) * smoothstep(8.1, 7.95, y) * smoothstep(0.55, 0.3, off_middle) * (skin.z > 1)
    bend = np.sin(y * 62 + 2.0 * noise(skin.template * 3 + traits.tex, volume)) * forehead * 0.22 * depth
    eye_corner = smoothstep(0.12, 0.0, abs(off_middle - 0.50)) * smoothstep(0.12, 0.03, abs(y - 7.27)) * (skin.z > 0.8)
    bend = bend + np.sin(y * 80 + off_middle * 30) * eye_corner * 0.18 * depth
    skin.normals[:, 1] += bend
    skin.normals[:] = normalise(skin.normals)


def _paint_cloth(skin: SkinPixels, view: View, volume: Array) -> Array:
    cloth = cloth_mask(skin.template, view.neck)
    folds = noise(skin.template * np.array([3.0, 1.2, 3.0], f32) + view.bg_seed % 50, volume)
    colour = linear_rgb(CLOTH_COLOURS[view.cloth]) * (1 + 0.10 * folds[:, None])
    skin.cover(cloth, colour)
    return cloth


def _set_gloss(skin: SkinPixels, traits: Traits, pores: Array, cloth: Array) -> None:
    """Forehead and nose shine, lips more so, cloth hardly."""
    shine = smoothstep(0.22, 0.0, skin.off_middle) * smoothstep(6.7, 7.0, skin.y) * 0.14
    lips = smoothstep(0.4, 0.8, skin.lips)
    gloss = (skin.gloss + shine + 0.04 * pores) * (1 - cloth) + 0.03 * cloth
    skin.gloss = gloss + lips * (0.18 + 0.3 * traits.makeup)
    skin.sharpness = skin.sharpness + 14 * lips
