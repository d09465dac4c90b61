"""The colours of a person: skin, hair, brows, lips, irises, all in linear light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.maths import Array, colour_ramp, f32, linear_rgb, mix, smoothstep
from lora_diffusion.world.people.traits import Traits

# Display colours by melanin.
SKIN_RAMP = (
    (0.0, (0.97, 0.84, 0.77)),
    (0.17, (0.93, 0.76, 0.66)),
    (0.35, (0.85, 0.66, 0.52)),
    (0.5, (0.74, 0.54, 0.40)),
    (0.65, (0.60, 0.41, 0.29)),
    (0.8, (0.44, 0.29, 0.20)),
    (1.0, (0.27, 0.175, 0.125)),
)
HAIR_RAMP = (
    (0.0, (0.93, 0.84, 0.64)),
    (0.2, (0.80, 0.64, 0.40)),
    (0.4, (0.56, 0.39, 0.22)),
    (0.6, (0.36, 0.235, 0.145)),
    (0.8, (0.19, 0.125, 0.085)),
    (1.0, (0.065, 0.052, 0.05)),
)
RED_HAIR = np.array([0.62, 0.26, 0.10])
BROWN_EYES, GREEN_EYES, BLUE_EYES = (
    np.array([0.30, 0.17, 0.09]),
    np.array([0.38, 0.46, 0.27]),
    np.array([0.40, 0.56, 0.70]),
)


@dataclass(frozen=True, eq=False)
class Palette:
    """Linear rgb, (3,) float32 each."""

    skin: Array
    hair: Array
    brows: Array  # also stubble and lashes
    lips: Array
    iris: Array


def build_palette(traits: Traits) -> Palette:
    skin = colour_ramp(traits.melanin, SKIN_RAMP)
    tone = traits.undertone
    skin = skin * np.array([1 + 0.015 * tone, 1 - 0.012 * tone, 1 - 0.05 * tone])

    hair = colour_ramp(traits.hair_mel, HAIR_RAMP)
    hair = mix(hair, RED_HAIR * (1.15 - 0.6 * traits.hair_mel), traits.hair_red * 0.85)
    brows = mix(hair * 0.72, np.array([0.5, 0.48, 0.46]), 0.6 * traits.grey)
    grey_hair = linear_rgb([0.80, 0.79, 0.77])

    lips = skin * mix(np.array([0.90, 0.68, 0.66]), np.array([0.86, 0.50, 0.50]), traits.lip_sat)
    lips = mix(lips, np.array([0.62, 0.13, 0.17]), 0.65 * traits.makeup)

    light_eyes = mix(BLUE_EYES, GREEN_EYES, traits.iris_hue)
    brown_eyes = BROWN_EYES * mix(1.15, 0.5, smoothstep(0.6, 1, traits.iris_mel))
    return Palette(
        skin=linear_rgb(skin.clip(0.02, 1)),
        hair=mix(linear_rgb(hair.clip(0.02, 1)), grey_hair, 0.9 * traits.grey**1.3).astype(f32),
        brows=linear_rgb(brows.clip(0.02, 1)),
        lips=linear_rgb(lips.clip(0.02, 1)),
        iris=linear_rgb(mix(light_eyes, brown_eyes, smoothstep(0.25, 0.6, traits.iris_mel))),
    )
