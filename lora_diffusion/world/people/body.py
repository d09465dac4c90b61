"""A person's body in the neutral pose: what stays the same from photo to photo. Built once, drawn many times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.accessories import GlassesMesh, build_glasses
from lora_diffusion.world.people.colours import base_colours
from lora_diffusion.world.people.facial_hair import BeardMesh, build_beard
from lora_diffusion.world.people.hair import HairMesh, build_hair
from lora_diffusion.world.people.head import head_model
from lora_diffusion.world.people.latents import SHAPE_GAIN, SHAPE_LATENTS
from lora_diffusion.world.people.maths import Array, f32
from lora_diffusion.world.people.palette import Palette, build_palette
from lora_diffusion.world.people.traits import Traits

# A resting face: the data's neutral one stares and pouts.
RESTING_FACE = (
    ("l-eye-scale-incr", 0.30),
    ("r-eye-scale-incr", 0.30),
    ("l-eye-height2-incr", 0.25),
    ("r-eye-height2-incr", 0.25),
    ("mouth-angles-up", 0.25),
    ("mouth-upperlip-volume-decr", 0.2),
    ("mouth-lowerlip-volume-decr", 0.2),
    ("eyebrows-angle-up", 0.15),
    ("fac:mouthSmileLeft", 0.06),
    ("fac:mouthSmileRight", 0.06),
)
ASYMMETRIES = ("nose-1", "mouth-1", "brown-1", "jaw-1")  # blendshapes of the latents asym1 .. asym4


@dataclass(frozen=True, eq=False)
class Body:
    """Geometry and colours of one person; V = vertices of the head model."""

    traits: Traits
    vertices: Array  # (V, 3) float32
    palette: Palette
    colours: Array  # (V, 3) float32, linear
    hair: HairMesh | None
    beard: BeardMesh | None
    glasses: GlassesMesh


def build_body(latents: Mapping[str, float], traits: Traits) -> Body:
    """The body of the person with these latents. Needs numba (hair and skin use its noise)."""
    vertices = shape_head(latents, traits)
    palette = build_palette(traits)
    return Body(
        traits=traits,
        vertices=vertices,
        palette=palette,
        colours=base_colours(traits, palette),
        hair=build_hair(vertices, traits),
        beard=build_beard(traits),
        glasses=build_glasses(vertices, traits),
    )


def shape_head(latents: Mapping[str, float], traits: Traits) -> Array:
    """Vertices (V, 3) of this person's head and shoulders."""
    head = head_model()
    vertices = head.vertices.copy()
    head.add_macro(vertices, traits.gender, traits.age, traits.muscle, traits.weight, traits.ancestry)
    for shape in SHAPE_LATENTS:
        # tanh: nobody is a caricature, however far out the latent
        weight = SHAPE_GAIN * shape.amplitude * 1.25 * math.tanh(latents[shape.name] / 1.25)
        target = shape.high if weight > 0 else shape.low
        if target is None:
            continue
        for side in ("l", "r") if "{s}" in target else ("",):
            head.add_target(vertices, target.replace("{s}", side), abs(weight))
    for target, weight in RESTING_FACE:
        head.add_target(vertices, target, weight)
    for i, name in enumerate(ASYMMETRIES, 1):
        x = latents[f"asym{i}"]
        head.add_target(vertices, f"asym-{name}-{'l' if x > 0 else 'r'}", min(0.5, 0.25 * abs(x)))

    # Eyes to where the mean's are, and most of the difference in size away: photos of faces are framed like that.
    eyes = (vertices[head.left_eye].mean(0) + vertices[head.right_eye].mean(0)) / 2
    mean_eyes = (head.mean[head.left_eye].mean(0) + head.mean[head.right_eye].mean(0)) / 2
    rigid = head.head_share > 0.95
    relative_height = np.ptp(vertices[rigid][:, 1]) / np.ptp(head.mean[rigid][:, 1])
    aligned: Array = ((vertices - eyes) * (1 / relative_height**0.75) + mean_eyes).astype(f32)
    return aligned
