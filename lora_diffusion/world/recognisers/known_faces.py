"""What the shipped recognisers know, measured on drawn photos as users take them: `faces/known.py` holds the statistics.

Photos differ in size, compression and colour; all are of people that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.crops import aligned_crop, placed
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.known import FILE, KnownFaces, fingerprint
from lora_diffusion.world.people import render, sample_person, sample_view

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

MAPS = {
    "resnet": (
        "/stage1/stage1.0/Relu_1_output_0",
        "/stage2/stage2.1/Relu_1_output_0",
        "/stage3/stage3.1/Relu_1_output_0",
    ),
}
"""Feature maps (B, C, H, W) by architecture: textures, parts, faces."""
LIMIT, SURE = 0.985, 0.9
"""Shares of good photos: all but 1.5 % pass, all but 10 % at the first look."""
FEWEST = 100


PHOTOS = ((40_000, 1500, 4, 96), (42_000, 300, 4, 64), (45_000, 200, 1, 256))
"""First person, people, photos of each, px: of the split `corpus`, which neither recogniser has seen."""


def drawn_photos(share: float = 1.0) -> Iterator[Pixels]:
    """A share of the people of PHOTOS."""
    for first, people, views, size in PHOTOS:
        for number in range(first, first + max(1, round(share * people))):
            yield from (render(sample_person(number), sample_view(number, view), size).image for view in range(views))


def measure_known(folder: Path, architecture: str, photos: Iterable[Pixels]) -> None:
    """Writes `known.npz` beside the ONNX files of `folder`. Raises ValueError if the detector finds too few faces."""
    (folder / FILE).unlink(missing_ok=True)
    maps = MAPS[architecture]
    embedder = FaceEmbedder(EmbedderConfig(model=str(folder), det_size=128), maps=maps)
    rng = np.random.default_rng(2412)
    values = [v for photo in photos if (v := described(embedder, presented(photo, rng))) is not None]
    strange = [v for photo in small_photographs(rng) if (v := described(embedder, photo)) is not None]
    if len(values) < FEWEST or len(strange) < FEWEST:
        raise ValueError(
            f"{len(values)} photos and {len(strange)} photographs show a face; {FEWEST} of each are needed"
        )
    fit_known(folder, maps, np.stack(values), np.stack(strange))


def fit_known(folder: Path, maps: Sequence[str], values_BD: Floats, photographs_BD: Floats) -> None:
    """Three quarters of the photos are fitted to, the rest sets the limits."""
    order = np.random.default_rng(0).permutation(len(values_BD))
    fitted_BD, judged_BD = np.split(values_BD[order], [3 * len(values_BD) // 4])
    known = KnownFaces.fit(maps, fitted_BD, photographs_BD, embedding=512)
    known.calibrate(judged_BD, LIMIT, SURE)
    known.recogniser = fingerprint(folder / "rec.onnx")
    known.save(folder / FILE)


def described(embedder: FaceEmbedder, photo_HW3: Pixels) -> Floats | None:
    """What the distance of the photo's face is measured with, or None if there is not one upright face."""
    bgr = np.ascontiguousarray(photo_HW3[..., ::-1])
    seen = embedder.detector.look_closely(bgr)
    if len(seen) != 1 or not seen[0].upright:
        return None
    points = seen[0].points
    return embedder.recogniser.describe(aligned_crop(bgr, points), placed(points), seen[0].score)[1]


def small_photographs(rng: np.random.Generator) -> Iterator[Pixels]:
    """The hundred faces of 25 px that scikit-image comes with, four times each: mirrored, in other light and colours.

    Of these only one direction is kept, an average over all: nothing of anybody's face.
    """
    from skimage.data import lfw_subset

    for face in lfw_subset()[:100]:
        for k in range(4):
            grey = cv2.resize(face[:, :: (-1) ** k].astype(np.float32) * 255, (100, 100), interpolation=cv2.INTER_CUBIC)
            grey = (grey - grey.mean()) * rng.uniform(0.8, 1.3) + grey.mean() + rng.uniform(-20, 20)
            tint = [rng.uniform(1, 1.15), rng.uniform(0.75, 0.95), rng.uniform(0.55, 0.9)] if k else [1, 1, 1]
            photo = grey[..., None] * tint + rng.normal(0, rng.uniform(0, 6), (100, 100, 3))
            yield np.clip(photo, 0, 255).astype(np.uint8)


def presented(photo_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """The photo as somebody may send it: half of them small, some through JPEG, few grey, few smaller in the picture."""
    photo = photo_HW3
    if rng.random() < 0.5:
        photo = np.asarray(cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA), np.uint8)
    if rng.random() < 0.1:
        top, bottom, left, right = rng.integers(0, photo.shape[0] // 2, 4).tolist()
        photo = np.asarray(cv2.copyMakeBorder(photo, top, bottom, left, right, cv2.BORDER_REPLICATE), np.uint8)
    if rng.random() < 0.05:
        photo = np.repeat(photo.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)
    if rng.random() < 0.25:
        _, data = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 96))])
        photo = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return photo
