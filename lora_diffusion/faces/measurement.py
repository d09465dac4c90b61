"""What a shipped recogniser folder can do, measured through insightface as users run it: the figures of its model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_diffusion.faces.composites import Labelled, compose
from lora_diffusion.faces.crops import CROP_SIZE, alignment
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, FaceError
from lora_diffusion.faces.recogniser_data import load_people
from lora_diffusion.faces.verification import Floats, verification_report

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
    error_N5 = np.stack(errors)
    figures: dict[str, float | int] = {
        "photos": len(data.photos),
        "found_once": found / len(data.photos),
        "missed": missed / len(data.photos),
        "found_several": several / len(data.photos),
        "too_small": small / len(data.photos),
        "landmark_error_px_mean": float(error_N5.mean()),
        "landmark_error_px_p95": float(np.percentile(error_N5.max(1), 95)),
        "eye_distance_px_mean": float(np.linalg.norm(data.points[:, 0] - data.points[:, 1], axis=1).mean()),
        "canvases": canvases,
    }
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


def embeddings_of(
    embedder: FaceEmbedder, folder: str, people: range, kind: str, by_landmarks: bool
) -> tuple[Floats, np.ndarray]:  # type: ignore[type-arg]
    """(P, V, 512) unit vectors and (P, V) bool, which photos had exactly one face found.

    `by_landmarks` aligns by the rendered landmarks; else everything goes through detection. A photo without a detected
    face is embedded by its landmarks, so that figures are over the same photos.
    """
    import cv2

    data = load_people(folder, people, (kind,))
    crops = np.empty((len(data.photos), CROP_SIZE, CROP_SIZE, 3), np.uint8)
    found = np.ones(len(crops), bool)
    for i, (photo, transform) in enumerate(zip(data.photos, alignment(data.points), strict=True)):
        answer = None if by_landmarks else embedder.embed_batch([photo])[0]
        if answer is None or isinstance(answer, FaceError):
            found[i] = answer is None
            crops[i] = cv2.warpAffine(photo, transform, (CROP_SIZE, CROP_SIZE), borderValue=0.0)
        else:
            crops[i] = answer.crop
    shape = (len(people), len(crops) // len(people))
    return embedder.embed_crops(crops).reshape(*shape, -1), found.reshape(shape)


def measure_recogniser(embedder: FaceEmbedder, folder: str, people: range) -> Figures:
    """Verification figures with probes as usual, with glasses or stubble changed, and with all hair changed."""
    photos_PVE, _ = embeddings_of(embedder, folder, people, "as-usual", by_landmarks=False)
    other_PVE, _ = embeddings_of(embedder, folder, people, "other-hair", by_landmarks=False)
    return {
        "as_usual": verification_report(photos_PVE),
        "other_hair": verification_report(photos_PVE, other_PVE),
    }


def open_folder(folder: Path) -> FaceEmbedder:
    """The embedder of a folder of ONNX files with the settings of the tiny world."""
    return FaceEmbedder(EmbedderConfig(model=str(folder), det_size=128))
