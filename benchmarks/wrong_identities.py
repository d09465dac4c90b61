"""How often a photo gives somebody else's identity without a word: photos on their side, tilted, small, cut, of several people.

python benchmarks/wrong_identities.py --people 100 --photographs folder/of/photographs

Each photo of a synthetic person is shown plainly and in situations that people really send. The answer is compared with
the galleries (means of six other photos) of all people. "wrong": accepted, and another person is nearer than the
person, though the same photo shown plainly is nearest to the person; "weak": the person is nearest, but below the cosine
that 999 of 1,000 comparisons of different people stay below; "hard": not nearest when shown plainly either. Photographs
are outside of what the bundled recogniser knows: each one accepted is wrong. Photos are rendered once into --photos.
"""

from __future__ import annotations

import argparse
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import write_result
from numpy.typing import NDArray

from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, mean_embedding
from lora_diffusion.faces.photos import PhotoError, load_photo

Pixels = NDArray[np.uint8]
Box = NDArray[np.float32]
FIRST, GALLERY, PROBES = 80_500, 6, 3
FAR = 1e-3
SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--photos", type=Path, default=Path("runs/wrong_identities.pkl"), help="rendered here, once")
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of photographs of real scenes")
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    if not args.photos.exists():
        args.photos.parent.mkdir(parents=True, exist_ok=True)
        args.photos.write_bytes(pickle.dumps([draw_person(FIRST + i) for i in range(args.people)]))
    people = pickle.loads(args.photos.read_bytes())[: args.people]
    embedder = FaceEmbedder(EmbedderConfig(model=args.model))
    result = measure(embedder, people)
    result["photographs"] = photographs(embedder, args.photographs)
    for name, row in result["situations"].items():
        print(f"{name:16}", row)
    print(result["photographs"])
    print(write_result("wrong_identities", result))


def draw_person(number: int) -> dict[str, Any]:
    """Six small photos, three large ones with the face's box, and one of 1,024 px in which the face is a sixth to a third wide."""
    from lora_diffusion.world.people import render, sample_person, sample_view

    person = sample_person(number)
    gallery = [render(person, sample_view(number, i), 64).image for i in range(GALLERY)]
    large = [render(person, sample_view(number, GALLERY + i), 256) for i in range(PROBES)]
    share, view = 1 / (3 + number % 4), sample_view(number, GALLERY)
    width = (large[0].face_box[2] - large[0].face_box[0]) / 256
    small = render(person, replace(view, zoom=view.zoom * share / float(width)), SIDE // 2).image
    return {
        "gallery": gallery,
        "photos": [(drawn.image, drawn.face_box) for drawn in large],
        "small": cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC),
    }


def turned(quarters: int) -> Callable[[Pixels, Box], Pixels]:
    return lambda photo, box: np.ascontiguousarray(np.rot90(photo, quarters))


def tilted(degrees: float) -> Callable[[Pixels, Box], Pixels]:
    def tilt(photo: Pixels, box: Box) -> Pixels:
        size = photo.shape[0]
        turn = cv2.getRotationMatrix2D((size / 2, size / 2), degrees, 1.0)
        return cv2.warpAffine(photo, turn, (size, size), borderMode=cv2.BORDER_REFLECT)  # type: ignore[return-value]

    return tilt


def within(share: float, x: float, y: float) -> Callable[[Pixels, Box], Pixels]:
    """The photo within 1,024 px so that the face is `share` of the width, at (x, y) of the free space."""

    def place(photo: Pixels, box: Box) -> Pixels:
        side = min(SIDE, round(SIDE * share * photo.shape[1] / float(box[2] - box[0])))
        how = cv2.INTER_AREA if side < photo.shape[0] else cv2.INTER_CUBIC
        small = cv2.resize(photo, (side, side), interpolation=how)
        left, top = round((SIDE - side) * x), round((SIDE - side) * y)
        return cv2.copyMakeBorder(small, top, SIDE - side - top, left, SIDE - side - left, cv2.BORDER_REPLICATE)  # type: ignore[return-value]

    return place


def cut(side: str, lost: float) -> Callable[[Pixels, Box], Pixels]:
    """Without `lost` of the face's width or height at one side."""

    def crop(photo: Pixels, box: Box) -> Pixels:
        x1, y1, x2, y2 = np.clip(box, 0, photo.shape[0])
        width, height = lost * (x2 - x1), lost * (y2 - y1)
        parts = {
            "left": photo[:, int(x1 + width) :],
            "right": photo[:, : int(x2 - width)],
            "top": photo[int(y1 + height) :],
            "bottom": photo[: int(y2 - height)],
        }
        return np.ascontiguousarray(parts[side])

    return crop


def portrait(y: float) -> Callable[[Pixels, Box], Pixels]:
    """970 x 2204 px, the photo at `y` of the height."""

    def place(photo: Pixels, box: Box) -> Pixels:
        wide = cv2.resize(photo, (970, 970), interpolation=cv2.INTER_CUBIC)
        top = round((2204 - 970) * y)
        return cv2.copyMakeBorder(wide, top, 2204 - 970 - top, 0, 0, cv2.BORDER_REPLICATE)  # type: ignore[return-value]

    return place


SITUATIONS: dict[str, Callable[[Pixels, Box], Pixels]] = {
    "plain 64 px": lambda photo, box: cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA),  # type: ignore[dict-item,return-value]
    "plain 256 px": lambda photo, box: photo,
    **{f"turned {90 * k}": turned(k) for k in (1, 2, 3)},
    **{f"tilted {degrees}": tilted(degrees) for degrees in (-30, 30)},
    **{f"1/{n} of the width": within(1 / n, x, y) for n, x, y in ((3, 0.2, 0.8), (4, 0.9, 0.5), (5, 0.5, 0.1), (6, 0.1, 0.7))},
    **{f"cut {side} {lost:g}": cut(side, lost) for side in ("left", "right", "top", "bottom") for lost in (0.2, 0.45)},
    "face alone": lambda photo, box: np.ascontiguousarray(photo[max(0, int(box[1])) : int(box[3]), max(0, int(box[0])) : int(box[2])]),
    **{f"portrait {y:g}": portrait(y) for y in (0.0, 0.4, 1.0)},
}  # fmt: skip


def measure(embedder: FaceEmbedder, people: list[dict[str, Any]]) -> dict[str, Any]:
    galleries = np.stack(
        [mean_embedding([f for p in person["gallery"] for f in embedder.find_drawn(p, 1)]) for person in people]
    )
    plain = [
        [face[0].vector if (face := embedder.find_drawn(photo, 1)) else None for photo, _ in person["photos"]]
        for person in people
    ]
    others = [v @ np.delete(galleries, i, 0).T for i, photos in enumerate(plain) for v in photos if v is not None]
    same = float(np.quantile(np.concatenate(others), 1 - FAR))
    rows: dict[str, dict[str, Any]] = {}

    def tell(situation: str, photo: Pixels, who: list[int], plainly: NDArray[np.float32] | None) -> None:
        row = rows.setdefault(
            situation, {"photos": 0, "right": 0, "weak": 0, "wrong": 0, "hard": 0, "refused": Counter(), "cosine": []}
        )
        row["photos"] += 1
        try:
            cosines = galleries @ embedder.embed(photo).vector
        except FaceError as error:
            row["refused"][error.reason] += 1
            return
        row["cosine"].append(float(cosines[who].max()))
        if int(cosines.argmax()) in who:
            row["right" if cosines.max() >= same else "weak"] += 1
        else:
            known = plainly is None or int((galleries @ plainly).argmax()) in who
            row["wrong" if known else "hard"] += 1

    for i, person in enumerate(people):
        for (photo, box), vector in zip(person["photos"], plain[i], strict=True):
            for name, situation in SITUATIONS.items():
                tell(name, situation(photo, box), [i], vector)
        tell("drawn small", person["small"], [i], plain[i][0])
    for name, photo, who in groups(people):
        tell(name, photo, who, None)
    for row in rows.values():
        row["cosine"] = round(float(np.median(row["cosine"])), 3) if row["cosine"] else None
        row["refused"] = dict(row["refused"])
    total = {key: sum(row[key] for row in rows.values()) for key in ("photos", "right", "weak", "wrong", "hard")}
    return {"people": len(people), "same_person_cosine": same, "total": total, "situations": rows}


def groups(people: list[dict[str, Any]]) -> Iterator[tuple[str, Pixels, list[int]]]:
    """Two and three people side by side, six in two rows, and two with a third far behind."""
    for i in range(0, len(people) - 5):
        tile = [cv2.resize(people[i + k]["photos"][0][0], (320, 320), interpolation=cv2.INTER_CUBIC) for k in range(6)]
        yield "two people", np.concatenate(tile[:2], 1), [i, i + 1]  # type: ignore[misc]
        yield "three people", np.concatenate(tile[:3], 1), [i, i + 1, i + 2]  # type: ignore[misc]
        rows = [np.concatenate(tile[k : k + 3], 1) for k in (0, 3)]
        yield "six people", np.concatenate(rows, 0), list(range(i, i + 6))  # type: ignore[misc]


def photographs(embedder: FaceEmbedder, folders: list[Path]) -> dict[str, Any]:
    """What becomes of photographs, faces and others; one of several pictures counts for each."""
    answers: Counter[str] = Counter()
    accepted = []
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.is_file()):
        try:
            photo = load_photo(path)
        except PhotoError:
            continue
        try:
            face = embedder.embed(photo)
            answers["accepted"] += 1
            accepted.append((path.name, round(face.distance, 3)))
        except FaceError as error:
            answers[error.reason] += 1
    return {"files": sum(answers.values()), "answers": dict(answers), "accepted": accepted}


if __name__ == "__main__":
    main()
