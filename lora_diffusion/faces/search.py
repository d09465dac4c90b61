"""The faces of a photo: one look where that is sure, more where it is not, and only faces that pass the checks.

Coordinates are px of the photo, (x, y).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import Doubt
from lora_diffusion.faces.crops import aligned_crop, placed
from lora_diffusion.faces.known import Recogniser
from lora_diffusion.faces.looks import Detector, Sighting, is_cut_off, overlap, share_outside, squares, with_margin
from lora_diffusion.faces.unit import unit

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

ROOM = 0.3
"""A face below this share of the photo leaves room for other people: its parts are looked at, too."""
TURNS = (90, 270, 180, 30, -30)
"""Degrees: how photos lie whose orientation got lost, and heads that are tilted."""
AT_BORDER, FAMILIAR = 0.05, 0.7
"""A face of which more than this share of the crop is beyond the border must be more familiar: half of it may be guessed."""
LONG = 1.3
PART = 0.6


@dataclass(frozen=True)
class FaceEmbedding:
    """vector: (512,) float32 of unit length. box (4,) x1 y1 x2 y2 and kps (5, 2) in px of the photo. crop (112, 112, 3) RGB.

    distance: from what the recogniser knows, 0..1; 0 for a recogniser that cannot say.
    """

    vector: Floats
    box: Floats
    kps: Floats
    det_score: float
    crop: Pixels
    distance: float = 0.0

    @property
    def quarters(self) -> int:
        """Quarter turns counterclockwise that bring the photo upright, 0..3, for `np.rot90`."""
        return round(Sighting(self.box, self.kps, self.det_score).roll / 90) % 4

    def turn_upright(self, photo_HW3: Pixels) -> tuple[Pixels, Floats]:
        """The photo, turned by `quarters`, and the box (4,) in it."""
        if not self.quarters:
            return photo_HW3, self.box
        height, width = photo_HW3.shape[:2]
        x1, y1, x2, y2 = self.box
        boxes = {1: (y1, width - x2, y2, width - x1), 2: (width - x2, height - y2, width - x1, height - y1), 3: (height - y2, x1, height - y1, x2)}  # fmt: skip
        turned = np.ascontiguousarray(np.rot90(photo_HW3, self.quarters))
        return turned, np.array(boxes[self.quarters], np.float32)

    @property
    def area(self) -> float:
        return float(np.prod(self.box[2:] - self.box[:2]))


@dataclass(frozen=True)
class Faces:
    """The faces of a photo that passed all checks, largest first; doubt: why there is none."""

    faces: tuple[FaceEmbedding, ...]
    doubt: Doubt | None = None


class FaceSearch:
    """min_face: px of the shorter side of a box; what is smaller is background."""

    def __init__(self, detector: Detector, recogniser: Recogniser, min_face: float) -> None:
        self._detector, self._recogniser, self._min_face = detector, recogniser, min_face

    def find(self, photo_HW3: Pixels, most: int) -> Faces:
        """The faces of a BGR photo, `most` of them at most."""
        seen = self._detector.look_closely(photo_HW3)
        found = self._embed(photo_HW3, seen, most)
        if not self._sure(photo_HW3, found, len(seen)):
            for more in self._looks(photo_HW3):
                seen = seen + more
                found = self._places(found + self._embed(photo_HW3, more, most))
                if self._sure(photo_HW3, found, 0):
                    break
        known = sorted((face for face in found if face.distance <= 1), key=lambda face: -face.area)
        whole = [face for face in known if not self._cut(face, photo_HW3.shape)]
        if known and not whole:
            return Faces(
                (), Doubt("face_cut_off", "shows a face that its border cuts off. Take one with the whole head.")
            )
        return Faces(tuple(whole[:most]), None if whole else self._doubt(seen, found))

    def _cut(self, face: FaceEmbedding, shape: Sequence[int]) -> bool:
        doubtful = face.distance > FAMILIAR and share_outside(face.kps, shape) > AT_BORDER
        return doubtful or is_cut_off(face.kps, shape, face.quarters)

    def first(self, photo_HW3: Pixels, most: int) -> list[FaceEmbedding]:
        """What one look shows, largest first, without any check."""
        seen = [face for face in self._detector.look(photo_HW3) if face.side >= self._min_face]
        return [self._face(photo_HW3, face) for face in seen[:most]]

    def _looks(self, photo: Pixels) -> Iterator[list[Sighting]]:
        """Further looks, those first that most doubtful photos need."""
        look, shape = self._detector.look_closely, photo.shape
        yield [face for window in [with_margin(shape), *self._along(shape)] for face in look(photo, window)]
        for degrees in TURNS:
            yield self._detector.look_turned(photo, degrees)
        yield [face for window in squares(shape, PART) for face in look(photo, window)]

    def _along(self, shape: Sequence[int]) -> list[tuple[float, float, float, float]]:
        return squares(shape, 1.0) if max(shape[:2]) > LONG * min(shape[:2]) else []

    def _sure(self, photo: Pixels, found: Sequence[FaceEmbedding], seen: int) -> bool:
        """Whether all that was seen is a face beyond doubt, and too large for others to be missed beside it."""
        large = ROOM * max(photo.shape[:2])
        return (
            len(found) >= max(1, seen)
            and all(face.distance <= self._recogniser.sure for face in found)
            and all(face.area >= (0.7 * large) * large for face in found)
        )

    def _embed(self, photo: Pixels, seen: Iterable[Sighting], most: int) -> list[FaceEmbedding]:
        """The sightings that can be faces; of several of one place, the one of the best score."""
        kept: list[Sighting] = []
        for face in sorted(seen, key=lambda s: -s.score):
            if face.side >= self._min_face and face.upright and all(overlap(face.box, k.box) < 0.5 for k in kept):
                kept.append(face)
        return [self._face(photo, face) for face in kept[:most]]

    def _face(self, photo: Pixels, seen: Sighting) -> FaceEmbedding:
        crop = aligned_crop(photo, seen.points)
        embedding, distance = self._recogniser.look(crop, placed(seen.points), seen.score)
        rgb = np.ascontiguousarray(crop[..., ::-1])
        return FaceEmbedding(
            unit(embedding),
            seen.box.astype(np.float32),
            seen.points.astype(np.float32),
            seen.score,
            rgb,
            distance,
        )

    def _places(self, found: Sequence[FaceEmbedding]) -> list[FaceEmbedding]:
        """Of several readings of one place, the one that is nearest to what the recogniser knows; of equals the first."""
        kept: list[FaceEmbedding] = []
        for face in sorted(found, key=lambda face: face.distance):
            if not any(_same_place(face.box, other.box) for other in kept):
                kept.append(face)
        return kept

    def _doubt(self, seen: Sequence[Sighting], found: Sequence[FaceEmbedding]) -> Doubt:
        if found:
            nearest = min(face.distance for face in found)
            return Doubt(
                "unfamiliar_face",
                f"shows no face that this recogniser knows: the nearest one is at {nearest:.2f}, where 1 is the limit. Take "
                "a photo where the face is upright, whole and lit; a recogniser of drawn heads knows no photographs.",
            )
        if not seen:
            return Doubt("no_face", "shows no face that can be used. Take one where it is larger, frontal and lit.")
        largest = max(face.side for face in seen)
        if largest < self._min_face:
            return Doubt(
                "face_too_small", f"shows a face of {largest:.0f} px; at least {self._min_face:g} px are needed."
            )
        return Doubt(
            "not_upright", "shows no upright face, whichever way it is turned: the points found are no face's."
        )


def _same_place(a_4: Floats, b_4: Floats) -> bool:
    """Whether the middle of one box lies in the other."""
    a, b = (a_4[:2] + a_4[2:]) / 2, (b_4[:2] + b_4[2:]) / 2
    return bool(((a >= b_4[:2]) & (a <= b_4[2:])).all() or ((b >= a_4[:2]) & (b <= a_4[2:])).all())
