"""What a shipped recogniser folder can do, measured through insightface as users run it: the figures of its model card."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.crops import CROP_SIZE, alignment
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.world.people import sample_view
from lora_diffusion.world.recognisers.composites import Labelled, compose
from lora_diffusion.world.recognisers.data import load_people
from lora_diffusion.world.recognisers.verification import Floats, verification_report

FEWEST_PAIRS = 1000
"""Pairs of different people that a true accept rate at FAR 1e-3 needs."""
Figures = dict[str, dict[str, float | int]]


def measure_detector(
    embedder: FaceEmbedder, folder: str, people: range, canvases: int = 1000
) -> dict[str, float | int]:
    """Found exactly once, none or several, over all photos; error of the points; composites of none and two faces."""
    data = load_people(folder, people)
    found, several, missed, small, errors = 0, 0, 0, 0, []
    for photo, points in zip(data.photos, data.points, strict=True):
        try:
            face = embedder.embed(photo)
        except FaceError as error:
            several += error.reason == "several_faces"
            missed += error.reason == "no_face"
            small += error.reason == "face_too_small"
            continue
        found += 1
        errors.append(np.linalg.norm(face.kps - points, axis=1))
    figures: dict[str, float | int] = {
        "photos": len(data.photos),
        "found_once": found / len(data.photos),
        "missed": missed / len(data.photos),
        "found_several": several / len(data.photos),
        "too_small": small / len(data.photos),
        "eye_distance_px_mean": float(np.linalg.norm(data.points[:, 0] - data.points[:, 1], axis=1).mean()),
        "canvases": canvases,
    }
    if errors:
        error_N5 = np.stack(errors)
        figures["landmark_error_px_mean"] = float(error_N5.mean())
        figures["landmark_error_px_p95"] = float(np.percentile(error_N5.mean(1), 95))
    return figures | _composites(embedder, data.labelled(), canvases)


def _composites(embedder: FaceEmbedder, data: Labelled, canvases: int) -> dict[str, float | int]:
    rng = np.random.default_rng(80_000)
    figures: dict[str, float | int] = {}
    for faces, name in ((0, "faceless_rejected"), (1, "one_face_found_once"), (2, "two_faces_refused")):
        right = 0
        for _ in range(canvases):
            reason = ""
            try:
                embedder.embed(compose(data, 128, rng, faces).canvas)
            except FaceError as error:
                reason = error.reason
            right += reason == ("no_face", "", "several_faces")[faces]
        figures[name] = right / canvases
    return figures


def embeddings_of(embedder: FaceEmbedder, folder: str, people: range, kind: str) -> Floats:
    """(P, V, 512) unit vectors of all photos, each through detection; by the rendered landmarks where that fails.

    So the figures are over the same photos for every detector; how often it fails stands in the detector's figures.
    """
    data = load_people(folder, people, (kind,))
    crops = np.empty((len(data.photos), CROP_SIZE, CROP_SIZE, 3), np.uint8)
    for i, (photo, transform) in enumerate(zip(data.photos, alignment(data.points), strict=True)):
        answer = embedder.embed_batch([photo])[0]
        if isinstance(answer, FaceError):
            crops[i] = cv2.warpAffine(photo, transform, (CROP_SIZE, CROP_SIZE), borderValue=0.0)
        else:
            crops[i] = answer.crop
    return embedder.embed_crops(crops).reshape(len(people), len(crops) // len(people), -1)


def measure_recogniser(embedder: FaceEmbedder, folder: str, people: range, gallery: int = 5) -> Figures:
    """Verification figures with a person's other photos as probes; of these, the ones with glasses put on or taken off,
    and the unshaven ones; and with photos of the same face with all hair drawn anew."""
    photos_PVE = embeddings_of(embedder, folder, people, "as-usual")
    other_PVE = embeddings_of(embedder, folder, people, "other-hair")
    views = range(gallery, photos_PVE.shape[1])
    worn_PV = np.array([[sample_view(number, view).accessory for view in views] for number in people])
    everyone_PV = np.broadcast_to(np.arange(len(people))[:, None], worn_PV.shape)
    figures = {"as_usual": verification_report(photos_PVE[:, :gallery], *_flat(photos_PVE[:, gallery:]))}
    for accessory in sorted(set(worn_PV.ravel()) - {"as usual"}):
        chosen = worn_PV == accessory
        if chosen.sum() * gallery * (len(people) - 1) < FEWEST_PAIRS:
            continue
        probes = photos_PVE[:, gallery:][chosen]
        figures[accessory.replace(" ", "_")] = verification_report(
            photos_PVE[:, :gallery], probes, everyone_PV[chosen].astype(np.int64)
        )
    figures["other_hair"] = verification_report(photos_PVE[:, :gallery], *_flat(other_PVE))
    return figures


def _flat(probes_PVE: Floats) -> tuple[Floats, NDArray[np.int64]]:
    people, views, size = probes_PVE.shape
    return probes_PVE.reshape(-1, size), np.repeat(np.arange(people), views)


def open_folder(folder: Path) -> FaceEmbedder:
    """The embedder of a folder of ONNX files with the settings of the tiny world."""
    return FaceEmbedder(EmbedderConfig(model=str(folder), det_size=128))
