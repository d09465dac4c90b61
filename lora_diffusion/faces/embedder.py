"""Photo -> identity embedding, through insightface: detect, align, embed.

One code path for both worlds. The tiny world's models are ONNX files that `FaceAnalysis` reads like those of its own
packs, so `model: tiny` and `model: buffalo_l` differ in files, not in code.

Axes: B images, E embedding (512), P people.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.choice import FaceError, Which, choose_face
from lora_diffusion.faces.crops import CROP_SIZE
from lora_diffusion.faces.known import Recogniser, fingerprint
from lora_diffusion.faces.looks import Detector
from lora_diffusion.faces.photos import load_photos
from lora_diffusion.faces.same_person import mean_of, one_person
from lora_diffusion.faces.search import FaceEmbedding, Faces, FaceSearch
from lora_diffusion.faces.unit import unit
from lora_diffusion.models.files import NotHereError, fetch_folder, here_only_now
from lora_diffusion.models.kinds import check_pointer
from lora_diffusion.places import Place, PlaceOrName, local_place, place_or_name

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = {"tiny": ASSETS / "recogniser", "tiny-b": ASSETS / "recogniser-b"}


@dataclass(frozen=True)
class EmbedderConfig:
    """Which models find and embed faces.

    model: "tiny" (ships with the package), "tiny-b" (a second opinion, for evaluation only), a folder of ONNX files
        (also s3://bucket/prefix), or the name of an insightface pack such as "buffalo_l", looked for in `root`/models.
    det_size: side in px of the square canvas that the photo is scaled to before detection; None is 128 for the bundled
        models and 640 for all others.
    min_face: smallest accepted side of the detected box, px of the photo.
    several_faces: "error", or "largest": take the largest of them.
    allow_download: fetch a named insightface pack that is not in `root` (about 280 MB for buffalo_l).
    threads: onnxruntime threads within an operator; 1 is right for one worker on each core.
    """

    model: PlaceOrName = "tiny"
    det_size: int | None = None
    det_thresh: float = 0.5  # lowest score of a detected face
    min_face: int = 12
    several_faces: Literal["error", "largest"] = "error"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)  # of onnxruntime, in order
    root: Place = "~/.insightface"  # where insightface keeps its packs
    allow_download: bool = False
    threads: int = 1


class FaceEmbedder:
    """Detects the one face of a photo and embeds it. Not thread-safe; build one for each worker.

    config: or the name alone of its `model`. maps: feature maps of a recogniser of which `known.npz` is yet to be measured.
    """

    def __init__(self, config: EmbedderConfig | str | None = None, maps: Sequence[str] = ()) -> None:
        config = EmbedderConfig(model=config) if isinstance(config, str) else config or EmbedderConfig()
        self.config = config
        _check(config)
        import onnxruntime
        from insightface.app import FaceAnalysis

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        folder = model_folder(config)
        for path in folder.glob("*.onnx"):
            check_pointer(path)
        try:
            app = FaceAnalysis(
                name=str(folder),
                allowed_modules=["detection", "recognition"],
                providers=list(config.providers),
                sess_options=options,
            )
        except AssertionError as error:  # insightface asserts that there is one, without a word
            raise ValueError(
                f"{folder} holds no detector that insightface knows, such as det_10g.onnx of buffalo_l: put one there"
            ) from error
        except Exception as error:  # of the dozen types of onnxruntime
            raise ValueError(f"the models in {folder} cannot be loaded ({error}): get the files again") from error
        if "recognition" not in app.models:
            raise ValueError(f"{folder} holds a detector but no recognition model (an ONNX of 112 × 112 input).")
        side = config.det_size or (128 if config.model in BUNDLED else 640)
        app.prepare(ctx_id=0, det_thresh=config.det_thresh, det_size=(side, side))
        self.detector = Detector(app.det_model, side)
        self.recogniser = Recogniser(app.models["recognition"], options, config.providers, maps)
        self._search = FaceSearch(self.detector, self.recogniser, config.min_face)

    def __repr__(self) -> str:
        return f"FaceEmbedder({self.name!r}, {self.fingerprint})"

    @property
    def name(self) -> str:
        return self.config.model

    @cached_property
    def fingerprint(self) -> str:
        """20 hex digits of SHA-256 over the recognition model's file: two embeddings can be compared if theirs is the same."""
        return fingerprint(self.recogniser.model_file)

    def knows(self, fingerprint: str) -> bool:
        """Whether `fingerprint` is this recogniser's; corpora of earlier releases have that of the whole folder."""
        if len(fingerprint) == len(self.fingerprint):
            return fingerprint == self.fingerprint
        return bool(fingerprint) and fingerprint == folder_fingerprint(self.config)

    def embed(self, image_HWC: Pixels) -> FaceEmbedding:
        """The one face of an RGB uint8 photo (H, W, 3). Raises FaceError where there is none, or several."""
        found = self.find(image_HWC)
        return choose_face(found.faces, found.doubt, "largest" if self.config.several_faces == "largest" else "one")

    def embed_person(self, photos: Any, faces: Which | None = None) -> Floats:
        """(512,) unit vector of the one person in a photo, or the mean of several: as `load_photos` takes them.

        faces: what a photo of several people means (default: as the configuration says). A photo of another person than most of
        them show is left out, with a warning. Raises PhotoError and FaceError, both ValueErrors, which name the photo.
        """
        which: Which = faces or ("largest" if self.config.several_faces == "largest" else "one")
        names, vectors = [], []
        for name, pixels in load_photos(photos):
            seen = self.find(pixels)
            names.append(name)
            vectors.append(choose_face(seen.faces, seen.doubt, which, name).vector)
        vectors_PE = np.stack(vectors)
        same_P, left_out = one_person(vectors_PE, names)
        for photo in left_out:
            warnings.warn(str(photo), stacklevel=3)
        return mean_of(vectors_PE[same_P])

    def find(self, image_HWC: Pixels, max_faces: int = 16) -> Faces:
        """The faces of an RGB uint8 photo (H, W, 3) that pass all checks, and why there is none."""
        return self._search.find(_bgr(image_HWC), max_faces)

    def find_drawn(self, image_HWC: Pixels, max_faces: int = 16) -> list[FaceEmbedding]:
        """What one look at a drawn picture shows, largest first: scores ask how near it is, not whether it is a person's."""
        return self._search.first(_bgr(image_HWC), max_faces)

    def locate(self, image_HWC: Pixels) -> tuple[Floats, Floats] | None:
        """Box (4,) and five points (5, 2), px, of the largest face that one look at a drawn picture shows; None: there is none."""
        seen = self.detector.look(_bgr(image_HWC))
        return (seen[0].box.astype(np.float32), seen[0].points.astype(np.float32)) if seen else None

    def embed_batch(self, images: Iterable[Pixels]) -> list[FaceEmbedding | FaceError]:
        """One answer for each image, in order; a FaceError takes the place of an embedding, nothing is raised for one."""
        answers: list[FaceEmbedding | FaceError] = []
        for image in images:
            try:
                answers.append(self.embed(image))
            except FaceError as error:
                answers.append(error)
        return answers

    def embed_crops(self, crops_BHWC: Pixels, batch_size: int = 64) -> Floats:
        """(B, 512) unit vectors of crops (B, 112, 112, 3) RGB that are aligned already: no detection, one network call a batch."""
        crops = np.asarray(crops_BHWC)
        if crops.ndim != 4 or crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3) or crops.dtype != np.uint8:
            raise ValueError(f"Expected RGB uint8 crops (B, 112, 112, 3), got {crops.dtype} {crops.shape}.")
        parts = []
        for start in range(0, len(crops), batch_size):
            batch = [np.ascontiguousarray(crop[..., ::-1]) for crop in crops[start : start + batch_size]]
            parts.append(unit(self.recogniser.embed(batch)))
        return np.concatenate(parts) if parts else np.zeros((0, 512), np.float32)


def face_boxes(embedder: FaceEmbedder, pictures_PHW3: Pixels) -> Floats:
    """(P, 4) float32, x1 y1 x2 y2 in px, where the one face of each picture is; NaN where there is none, or several."""
    found = [_drawn(embedder, picture) for picture in pictures_PHW3]
    return np.stack([np.full(4, np.nan, np.float32) if face is None else face.box for face in found])


def _drawn(embedder: FaceEmbedder, picture: Pixels) -> FaceEmbedding | None:
    """The face of a drawn picture; with several, the largest if the configuration takes it."""
    found = embedder.find_drawn(picture, max_faces=2)
    return found[0] if len(found) == 1 or (found and embedder.config.several_faces == "largest") else None


def mean_embedding(embeddings: Sequence[FaceEmbedding] | Floats) -> Floats:
    """(512,) unit vector of one person: the mean of unit vectors, normalised again."""
    if isinstance(embeddings, np.ndarray):
        vectors = embeddings
    else:
        vectors = np.stack([e.vector for e in embeddings]) if len(embeddings) else np.zeros((0, 512), np.float32)
    if not len(vectors):
        raise ValueError("A mean embedding needs at least one photo with a face, got none.")
    return mean_of(vectors)


def model_folder(config: EmbedderConfig) -> Path:
    """The folder of ONNX files that `config.model` names. Raises ValueError that says where it looked and what to do."""
    if config.model in BUNDLED:
        return BUNDLED[config.model]
    model = place_or_name(config.model)
    if model.startswith("s3://"):
        fetched = fetch_folder(model)
        return _unpacked(fetched) or fetched
    folder = Path(model)
    if folder.is_dir():
        found = _unpacked(folder)
        if found is None:
            raise ValueError(f"{folder} holds no .onnx file. A model folder needs a detector and a recogniser.")
        return found
    if "/" in model:
        raise ValueError(
            f"There is no folder {model}. Give a folder of ONNX files, one of {sorted(BUNDLED)}, or a pack."
        )
    root = local_place(config.root, "embedder.root")
    pack = root / "models" / config.model
    unpacked = _unpacked(pack)
    if unpacked is not None:
        return unpacked
    if not config.allow_download:
        raise ValueError(
            f"The insightface pack {config.model!r} is not in {pack}. Unpack it there, set allow_download: true to fetch "
            f"it, or use one of the bundled models: {', '.join(sorted(BUNDLED))}."
        )
    if here_only_now():
        raise NotHereError(f"recogniser {config.model} is not in {pack} yet: it would be fetched (about 280 MB)")
    return _download(config.model, root)


def _unpacked(folder: Path) -> Path | None:
    """Where the ONNX files are: in `folder`, or one below, as antelopev2.zip unpacks into antelopev2/antelopev2/."""
    inner = [path for path in sorted(folder.glob("*")) if path.is_dir() and any(path.glob("*.onnx"))]
    if any(folder.glob("*.onnx")):
        return folder
    return inner[0] if len(inner) == 1 else None


def folder_fingerprint(config: EmbedderConfig) -> str:
    """16 hex digits over all ONNX files of the folder, detector included: what decides the bits of a corpus' row."""
    digest = hashlib.sha256()
    for path in sorted(model_folder(config).glob("*.onnx")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _download(name: str, root: Path) -> Path:
    from insightface.utils import ensure_available

    fetch: Callable[..., str] = ensure_available
    try:
        return Path(fetch("models", name, root=str(root)))
    except Exception as error:
        raise ValueError(
            f"The insightface pack {name!r} could not be fetched ({error}). Without network, unpack it by hand into "
            f"{root / 'models' / name}."
        ) from error


def _check(config: EmbedderConfig) -> None:
    import onnxruntime

    known = onnxruntime.get_available_providers()
    unknown = [p for p in config.providers if p not in known]
    if unknown:
        raise ValueError(f"onnxruntime has no provider {unknown} here; it has {known}.")
    if not 0 < config.det_thresh < 1:
        raise ValueError(f"det_thresh is a score between 0 and 1, got {config.det_thresh}.")
    if config.det_size is not None and (config.det_size < 32 or config.det_size % 32):
        raise ValueError(f"det_size is a multiple of 32 px, got {config.det_size}.")
    if config.several_faces not in ("error", "largest"):
        raise ValueError(f"several_faces is 'error' or 'largest', got {config.several_faces!r}.")


def _bgr(image_HWC: Pixels) -> Pixels:
    image = np.asarray(image_HWC)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"Expected an RGB uint8 image (H, W, 3), got {image.dtype} {image.shape}. Use photos.load_photo."
        )
    return np.ascontiguousarray(image[..., ::-1])


def embed_pictures(
    embedder: FaceEmbedder, pictures: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(..., H, W, 3) -> unit embeddings (..., E) and whether a face was found; a picture without one is all zeros.

    Zeros make its similarity 0: a LoRA that destroys the face is not rewarded for it.
    """
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    faces = [_drawn(embedder, picture) for picture in flat]
    found = np.array([face is not None for face in faces])
    vectors = np.stack([np.zeros(512, np.float32) if face is None else face.vector for face in faces])
    shape = pictures.shape[:-3]
    return vectors.reshape(*shape, -1), found.reshape(shape)
