"""The identity of a synthetic person as named numbers, each N(0, 1).

Every latent draws from its own random stream, named by (seed, person, crc32 of the latent's name). A latent that is
added, removed or moved in the tables below therefore changes no other latent of anybody. Renaming one redraws it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class ShapeLatent:
    """A latent that morphs the head along a pair of opposite blendshapes.

    ``{s}`` in a name stands for the left and the right side, which move together.
    """

    name: str
    low: str | None  # blendshape for negative values, None: negative values do nothing
    high: str  # blendshape for positive values
    amplitude: float  # blendshape weight of one standard deviation, before SHAPE_GAIN


# Makes the crowd less extreme than the data's full range: at 1.0 caricatures are common.
SHAPE_GAIN = 0.62


def _pair(name: str, amplitude: float, low: str = "decr", high: str = "incr", stem: str | None = None) -> ShapeLatent:
    stem = stem or name
    return ShapeLatent(name, f"{stem}-{low}", f"{stem}-{high}", amplitude)


# The order is that in which the blendshapes are added: float sums, so changing it changes the last bits.
SHAPE_LATENTS: tuple[ShapeLatent, ...] = (
    # head and forehead
    _pair("head-fat", 0.8),
    _pair("head-angle", 0.5, "out", "in"),
    _pair("head-scale-horiz", 0.6),
    _pair("head-scale-vert", 0.6),
    _pair("head-scale-depth", 0.5),
    ShapeLatent("head-roundrect", "head-rectangular", "head-round", 0.65),
    ShapeLatent("head-tri", "head-triangular", "head-invertedtriangular", 0.65),
    ShapeLatent("head-sqoval", "head-square", "head-oval", 0.65),
    _pair("head-back-scale-depth", 0.6),
    ShapeLatent("head-diamond", None, "head-diamond", 0.6),
    _pair("forehead-scale-vert", 0.6),
    _pair("forehead-nubian", 0.4),
    _pair("forehead-temple", 0.5),
    _pair("forehead-trans", 0.6, "backward", "forward"),
    # brows and eyes
    _pair("eyebrows-angle", 0.9, "down", "up"),
    _pair("eyebrows-trans", 0.9, "down", "up"),
    _pair("{s}-eye-scale", 0.8),
    _pair("{s}-eye-trans-x", 0.75, "in", "out", stem="{s}-eye-trans"),
    _pair("{s}-eye-trans-y", 0.6, "down", "up", stem="{s}-eye-trans"),
    _pair("{s}-eye-corner1", 0.9, "down", "up"),
    _pair("{s}-eye-corner2", 0.8, "down", "up"),
    _pair("{s}-eye-epicanthus", 0.7, "out", "in"),
    _pair("{s}-eye-height2", 0.8),
    _pair("{s}-eye-bag", 0.6),
    _pair("{s}-eye-eyefold", 0.6, "down", "up"),
    _pair("{s}-eye-push2", 0.5, "in", "out"),
    # nose
    _pair("nose-scale-horiz", 0.9),
    _pair("nose-scale-vert", 0.9),
    _pair("nose-scale-depth", 0.8),
    _pair("nose-hump", 0.8),
    _pair("nose-curve", 0.8, "concave", "convex"),
    _pair("nose-point", 0.8, "down", "up"),
    _pair("nose-point-width", 0.8),
    _pair("nose-width1", 0.7),
    _pair("nose-width2", 0.8),
    _pair("nose-width3", 0.8),
    _pair("nose-volume", 0.7),
    _pair("nose-nostrils-width", 0.8),
    _pair("nose-base", 0.7, "down", "up"),
    _pair("nose-flaring", 0.7),
    _pair("nose-trans", 0.6, "down", "up"),
    _pair("nose-greek", 0.6),
    # mouth
    _pair("mouth-scale-horiz", 0.9),
    _pair("mouth-scale-vert", 0.7),
    _pair("mouth-trans", 0.7, "down", "up"),
    _pair("mouth-upperlip-height", 0.8),
    _pair("mouth-upperlip-volume", 0.8),
    _pair("mouth-lowerlip-height", 0.8),
    _pair("mouth-lowerlip-volume", 0.8),
    _pair("mouth-angles", 0.6, "down", "up"),
    _pair("mouth-cupidsbow", 0.6),
    _pair("mouth-trans-z", 0.5, "backward", "forward", stem="mouth-trans"),
    # chin, cheeks, ears, neck
    _pair("chin-width", 0.9),
    _pair("chin-height", 0.9),
    _pair("chin-prominent", 0.8),
    _pair("chin-jaw-drop", 0.7),
    _pair("chin-bones", 0.8),
    _pair("chin-cleft", 0.6),
    ShapeLatent("chin-triangle", None, "chin-triangle", 0.7),
    _pair("chin-prognathism", 0.5),
    _pair("{s}-cheek-bones", 0.9),
    _pair("{s}-cheek-volume", 0.9),
    _pair("{s}-cheek-inner", 0.7),
    _pair("{s}-ear-scale", 0.8),
    _pair("{s}-ear-wing", 0.9),
    _pair("{s}-ear-lobe", 0.8),
    _pair("neck-scale-horiz", 0.7),
    _pair("neck-double", 0.5),
)

# Latents whose meaning `traits.decode` gives: age, colours, hair, beard, brows, glasses, marks.
TRAIT_LATENTS: tuple[str, ...] = (
    *("gender", "age", "anc_a", "anc_b", "anc_c", "melanin", "undertone", "weight", "muscle"),
    *("hair_mel", "hair_red", "hair_grey", "hair_len", "hair_vol", "hair_curl", "hairline", "temple", "part", "fringe"),
    *("side_thick", "bun", "balding", "quiff"),
    *("beard_stub", "moustache", "goatee", "fullbeard", "beard_len"),
    *("brow_thick", "brow_arch", "brow_len", "brow_gap", "brow_dark", "brow_y"),
    *("iris_mel", "iris_hue", "lip_sat", "makeup", "freckle", "blush"),
    *("glasses", "gl_round", "gl_size", "gl_col", "gl_thick"),
    *("tex_x", "tex_y", "tex_z", "mole1", "mole2", "mole3", "asym1", "asym2", "asym3", "asym4", "eye_dark"),
)

LATENT_NAMES: tuple[str, ...] = tuple(shape.name for shape in SHAPE_LATENTS) + TRAIT_LATENTS


def sample_latents(seed: int, number: int, names: tuple[str, ...] = LATENT_NAMES) -> Mapping[str, float]:
    """The latents of person ``number`` by name: independent N(0, 1) numbers, rounded to float32; read-only."""
    return MappingProxyType({name: _draw(seed, number, name) for name in names})


def _draw(seed: int, number: int, name: str) -> float:
    stream = np.random.Generator(np.random.PCG64([seed, number, zlib.crc32(name.encode())]))
    return float(np.float32(stream.standard_normal()))
