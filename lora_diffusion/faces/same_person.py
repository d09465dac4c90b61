"""Photos that are said to show one person: whose they are, and which show somebody else.

Axes: P photos, E embedding (512), of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import FaceError, LeftOut
from lora_diffusion.faces.unit import unit

LEAST = 0.2
"""Cosine with the others below which a photo shows another person."""
DIFFERENT = "nobody is in more than half of the photos, which show different people"


def mean_of(vectors_PE: NDArray[np.float32]) -> NDArray[np.float32]:
    """(E,) of unit length: one person's embedding."""
    return unit(unit(vectors_PE).mean(axis=0))


def one_person(
    vectors_PE: NDArray[np.float32], names: Sequence[str], least: float = LEAST
) -> tuple[NDArray[np.bool_], tuple[LeftOut, ...]]:
    """(P,) which photos show the person that most of them show, and the others. names: what a sentence calls each photo.

    Raises FaceError "different_people" where nobody is in more than half of them.
    """
    others = other_people(vectors_PE, least)
    if len(others) == len(vectors_PE):
        told = ", ".join(f"{names[place]} {cosine:.2f}" for place, (cosine, _) in others.items())
        raise FaceError(
            "different_people",
            f"The photos show different people (cosine of each with the others: {told}). Send photos of one person.",
        )
    same_P = np.array([place not in others for place in range(len(vectors_PE))])
    return same_P, tuple(LeftOut(names[place], cosine) for place, (cosine, _) in others.items())


def other_people(vectors_PE: NDArray[np.float32], least: float) -> dict[int, tuple[float, str]]:
    """Photos that show somebody else than most do: their cosine with the mean of those, and what is wrong, in words.

    Most are the photos around the one that has most others near it, by a cosine of `least`. Where they are no more than half,
    nobody can tell whose photos these are: then all are left out.
    """
    near_PP = vectors_PE @ vectors_PE.T >= least
    most_P = near_PP[near_PP.sum(1).argmax()]
    if most_P.sum() * 2 <= len(vectors_PE) > 1:
        means = [mean_of(np.delete(vectors_PE, place, axis=0)) for place in range(len(vectors_PE))]
        return {place: (float(vectors_PE[place] @ mean), DIFFERENT) for place, mean in enumerate(means)}
    message = "the photo shows another person than most of the photos"
    cosine_P = vectors_PE @ mean_of(vectors_PE[most_P])
    return {place: (float(cosine), message) for place, cosine in enumerate(cosine_P) if cosine < least}
