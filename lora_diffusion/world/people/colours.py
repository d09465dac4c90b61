"""The colour of a head before light and make-up: skin, lips, mouth, teeth, lashes."""

from __future__ import annotations

import numpy as np

from lora_diffusion.world.people.head import LASHES, TEETH, TONGUE, head_model
from lora_diffusion.world.people.maths import Array, f32, linear_rgb, smoothstep
from lora_diffusion.world.people.palette import Palette
from lora_diffusion.world.people.raster import noise
from lora_diffusion.world.people.traits import Traits


def base_colours(traits: Traits, palette: Palette) -> Array:
    """Colour of every vertex of the head (V, 3) float32, linear: skin with its blush, lips, mouth, teeth, lashes."""
    head = head_model()
    template = head.mean

    def spot(x: float, y: float, z: float, radius: float, amount: float) -> Array:
        """A soft spot and its mirror image on the other side."""
        squared = (abs(template[:, 0]) - x) ** 2 + (template[:, 1] - y) ** 2 + (template[:, 2] - z) ** 2
        faded: Array = amount * np.exp(-squared / (2 * radius * radius))
        return faded

    redness = np.zeros(len(template), f32)
    cheeks = spot(0.36, 6.92, 1.25, 0.17, 0.35 + 0.8 * traits.blush)
    nose = spot(0, 6.88, 1.6, 0.11, 0.5 + 0.4 * traits.blush)
    redness += cheeks + nose + spot(0, 6.25, 1.4, 0.12, 0.25) + 0.5 * head.ears
    redness += spot(0.25, 7.28, 1.3, 0.12, 0.25)  # eyelids
    redness *= 1.0 - 0.65 * traits.melanin

    colours = np.tile(palette.skin, (len(template), 1))
    colours *= np.stack([1 - 0.02 * redness, 1 - 0.26 * redness, 1 - 0.24 * redness], 1)
    under_eyes = spot(0.27, 7.21, 1.33, 0.085, 0.35 * traits.eye_dark + 0.15 * traits.age)
    colours *= 1 - under_eyes[:, None] * np.array([0.8, 1, 0.9])
    blotches = noise(template * 2.2 + traits.tex * 3, head.noise_volume)[:, None]
    colours *= 1 + 0.07 * blotches * np.array([0.7, 1, 1])

    lips = smoothstep(0.25, 0.75, head.lips)[:, None]
    colours = colours * (1 - lips) + palette.lips * lips
    mouth = (smoothstep(0.3, 0.7, head.inside_mouth) * (1 - lips[:, 0]))[:, None]
    colours = colours * (1 - mouth) + np.array([0.22, 0.05, 0.045]) * mouth
    colours[head.vertex_materials == TEETH] = linear_rgb([0.93, 0.90, 0.84])
    colours[head.vertex_materials == TONGUE] = linear_rgb([0.72, 0.36, 0.36])
    colours[head.vertex_materials == LASHES] = palette.brows * 0.30 + 0.01
    return colours.astype(f32)
