"""Synthetic people: invented faces, as many photos of each as one wants, and words for what they show.

>>> person = sample_person(20_000)
>>> photo = render(person, sample_view(20_000, index=0), size=64).image

A person is a number; the number fixes the identity (124 latents) and the split. A view is everything else: pose,
expression, light, place, clothes, whether glasses are on. Only :func:`render` and ``Person.body`` need numba (the extra
``faces``). The head is a morph of the CC0 MakeHuman data (see ``lora_diffusion/assets/head/README.md``).
"""

from lora_diffusion.world.people.latents import LATENT_NAMES
from lora_diffusion.world.people.people import SPLITS, Person, sample_person, sample_view, split_of
from lora_diffusion.world.people.renderer import Rendering, render
from lora_diffusion.world.people.traits import Traits
from lora_diffusion.world.people.views import BACKGROUNDS, CLOTH_COLOURS, EXPRESSIONS, LIGHTS, View

__all__ = [
    "BACKGROUNDS",
    "CLOTH_COLOURS",
    "EXPRESSIONS",
    "LATENT_NAMES",
    "LIGHTS",
    "SPLITS",
    "Person",
    "Rendering",
    "Traits",
    "View",
    "render",
    "sample_person",
    "sample_view",
    "split_of",
]
