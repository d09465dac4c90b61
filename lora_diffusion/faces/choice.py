"""Which face of a photo is the person's, or why none is: one rule for jobs, endpoint and command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

FaceReason = Literal[
    "no_face", "not_upright", "face_too_small", "face_cut_off", "unfamiliar_face", "several_faces", "different_people"
]
Which = Literal["one", "largest"]
Face = TypeVar("Face")


class FaceError(ValueError):
    """A photo that does not show exactly one usable face, or photos that do not show one person. `reason` is one of `FaceReason`."""

    def __init__(self, reason: FaceReason, message: str) -> None:
        super().__init__(message)
        self.reason: FaceReason = reason

    def __reduce__(self) -> tuple[type[FaceError], tuple[FaceReason, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Doubt:
    """Why a photo shows no face that can be used. sentence: goes on after the photo's name."""

    reason: FaceReason
    sentence: str


@dataclass(frozen=True)
class LeftOut:
    """A photo of another person than the rest show. cosine: with their mean embedding."""

    photo: str
    cosine: float

    def __str__(self) -> str:
        return f"{self.photo} shows another person than the other photos (cosine {self.cosine:.2f}) and was left out"


def choose_face(faces: Sequence[Face], doubt: Doubt | None, which: Which, photo: str = "The photo") -> Face:
    """The person's face among `faces`, largest first. Raises FaceError where there is none, or several and `which` is "one"."""
    if which not in get_args(Which):
        raise ValueError(f"faces is {which!r}: it is one of {', '.join(get_args(Which))}")
    if not faces:
        doubt = doubt or Doubt("no_face", "shows no face.")
        raise FaceError(doubt.reason, f"{photo} {doubt.sentence}")
    if len(faces) > 1 and which == "one":
        raise FaceError(
            "several_faces",
            f"{photo} shows {len(faces)} faces. Crop it to one person, or ask for the largest: faces=largest.",
        )
    return faces[0]
