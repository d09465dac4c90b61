"""People by number: the number decides who it is, and which split the person belongs to, once and for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lora_diffusion.world.people.body import Body, build_body
from lora_diffusion.world.people.latents import LATENT_NAMES, sample_latents
from lora_diffusion.world.people.maths import Array
from lora_diffusion.world.people.traits import Traits, decode
from lora_diffusion.world.people.views import View, draw_view

# Everybody in the project comes from this seed: another seed is another population.
SEED = 2412

# Nobody is in two splits: whatever is trained on one of them has never seen the others.
SPLITS: Mapping[str, range] = {
    "base": range(0, 10_000),  # base model and its recogniser
    "recogniser-b": range(10_000, 20_000),  # the second recogniser, for evaluation only
    "corpus": range(20_000, 80_000),  # people whose LoRAs make the corpus
    "held-out": range(80_000, 90_000),  # people that nothing is trained on
}


@dataclass(frozen=True, eq=False)
class Person:
    """One synthetic person: the number decides everything else."""

    number: int
    latents: Mapping[str, float]  # N(0, 1) numbers by name
    traits: Traits  # what they mean

    @property
    def name(self) -> str:
        """``person-020000``: folder name and key in tables."""
        return f"person-{self.number:06d}"

    @property
    def split(self) -> str:
        return split_of(self.number)

    @property
    def vector(self) -> Array:
        """The latents as float32 (len(LATENT_NAMES),), in that order."""
        return np.array([self.latents[name] for name in LATENT_NAMES], np.float32)

    @cached_property
    def body(self) -> Body:
        """Head, hair, beard and glasses as meshes with colours; built once, about 10 ms."""
        return build_body(self.latents, self.traits)


def split_of(number: int) -> str:
    """Name of the split that person ``number`` belongs to; ValueError for a number in none."""
    for name, numbers in SPLITS.items():
        if number in numbers:
            return name
    limits = ", ".join(f"{name} {numbers.start}..{numbers.stop - 1}" for name, numbers in SPLITS.items())
    raise ValueError(f"person {number} is in no split; people are numbered {limits}")


def sample_person(number: int) -> Person:
    """Person ``number`` (0 .. 89,999, see SPLITS): the same number gives the same person on every machine."""
    split_of(number)  # refuses numbers out of range
    latents = sample_latents(SEED, number)
    return Person(number, latents, decode(latents))


def sample_view(number: int, index: int) -> View:
    """View ``index`` (from 0) of person ``number``: independent of all other views."""
    return draw_view(np.random.default_rng([SEED, number, index]))
