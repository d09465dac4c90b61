"""Photos of one person -> training pictures and one identity embedding, or the reason why not.

Axes: P photos, H/W pixels.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lora_diffusion.artifacts.identity import Mismatch
from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.schema import KEPT, Failure
from lora_diffusion.faces.apart import load_photo_within
from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.crops import CROP_SIZE
from lora_diffusion.faces.embedder import FaceEmbedder, folder_fingerprint, mean_embedding, model_folder
from lora_diffusion.faces.photos import PhotoError, PhotoReason, prepare_photo
from lora_diffusion.faces.same_person import other_people
from lora_diffusion.faces.search import FaceEmbedding
from lora_diffusion.factory.config import CorpusConfig, PhotoConfig
from lora_diffusion.factory.people import PersonRef, RawPhoto, open_people
from lora_diffusion.storage import StoreError

if TYPE_CHECKING:
    from lora_diffusion.lora.photo_data import PersonPhotos


@dataclass(frozen=True)
class EmbeddedPerson:
    """One person ready for fine-tuning, or not: then a failure with `photo` None is among `failures`."""

    position: int
    identity: str
    pictures: tuple[bytes, ...] = ()  # PNG, square, of the base model's size
    captions: tuple[str, ...] | None = None
    face_boxes: np.ndarray | None = None  # (P, 4) float32, x1 y1 x2 y2 in px of the pictures
    embedding: np.ndarray | None = None  # (512,) float32, unit norm
    photo_embeddings: np.ndarray | None = None  # (P, 512), which `embedding` is the mean of
    photo_similarity: float = float("nan")
    photo_sha256: tuple[str, ...] = ()
    seconds: float = 0.0
    consent: str | None = None
    failures: tuple[Failure, ...] = ()

    @property
    def usable(self) -> bool:
        return self.embedding is not None

    def photos(self) -> PersonPhotos:
        """The pictures as fine-tuning takes them; of a usable person."""
        from lora_diffusion.lora.photo_data import PersonPhotos

        pixels_PHW3 = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in self.pictures])
        return PersonPhotos(self.identity, pixels_PHW3, self.captions, self.face_boxes)


class PersonEmbedder:
    """Reads, checks, embeds and crops. One for each worker; photos come from `config.people`."""

    def __init__(self, config: CorpusConfig, picture_size: int) -> None:
        self.config = config
        self.picture_size = picture_size
        self.source = open_people(config.people)
        self.embedder = FaceEmbedder(config.embedder)

    def check(self, manifest: Manifest) -> None:
        """Raises ValueError if this machine's detector or recogniser is not what the corpus is made with."""
        there, here = manifest.recipe["embedder"]["fingerprint"], folder_fingerprint(self.config.embedder)
        if there != here:
            raise Mismatch(
                f"the models in {model_folder(self.config.embedder)} ({here}) differ from those that the corpus at "
                f"{self.config.output} is made with ({there}): put the same files on every machine, or in a bucket"
            )

    def __call__(self, position: int, person: PersonRef) -> EmbeddedPerson:
        """Never raises for what is wrong with one person or photo. Raises StoreError if the store does not answer."""
        start = time.perf_counter()
        if person.problem is not None:
            reason, message = person.problem
            failure = Failure(position, person.identity, None, "read", reason, message)
            return EmbeddedPerson(position, person.identity, failures=(failure,))
        try:
            embedded = self._embed(position, person)
        except StoreError:
            raise
        except Exception as error:
            failure = Failure(position, person.identity, None, "embed", "error", f"{type(error).__name__}: {error}")
            embedded = EmbeddedPerson(position, person.identity, failures=(failure,))
        return replace(embedded, seconds=time.perf_counter() - start)

    def try_out(self) -> None:
        """Raises what the models raise whoever is in the photo."""
        noise_HW3 = np.random.default_rng(0).integers(0, 256, (CROP_SIZE, CROP_SIZE, 3), np.uint8)
        self.embedder.embed_batch([noise_HW3])
        self.embedder.embed_crops(noise_HW3[None])

    def _embed(self, position: int, person: PersonRef) -> EmbeddedPerson:
        consent = self.source.consent(person)
        if self.config.require_consent and not consent:
            message = f"require_consent is set, and {self.source.uri} has no consent of this person"
            failure = Failure(position, person.identity, None, "read", "no_consent", message)
            return EmbeddedPerson(position, person.identity, failures=(failure,))
        photos = self.source.photos(person, self.config.photos.max_photos)
        failures: list[Failure] = []
        kept: list[tuple[RawPhoto, bytes, np.ndarray, FaceEmbedding]] = []
        for photo in photos:
            faults: list[PhotoReason] = []
            try:
                kept.append((photo, *self._embed_photo(photo, faults)))
                message = "the file lacks its end; its picture is whole and was used"
                failures += [Failure(position, person.identity, photo.name, KEPT, fault, message) for fault in faults]
            except (PhotoError, FaceError) as error:
                stage = "read" if isinstance(error, PhotoError) else "embed"
                failures.append(Failure(position, person.identity, photo.name, stage, error.reason, str(error)))
        least = self.config.photos.same_person
        if least is not None and kept:
            others = other_people(np.stack([face.vector for *_, face in kept]), least)
            for place, (cosine, message) in others.items():
                message = f"{message}: cosine {cosine:.2f}, photos.same_person is {least:g}"
                name = kept[place][0].name
                failures.append(Failure(position, person.identity, name, "embed", "another_person", message))
            kept = [photo for place, photo in enumerate(kept) if place not in others]
        if len(kept) < self.config.photos.min_photos:
            failures.append(self._too_few(position, person, len(photos), len(kept), failures))
            return EmbeddedPerson(position, person.identity, failures=tuple(failures))
        used, pictures, boxes, faces = zip(*kept, strict=True)
        vectors_PE = np.stack([face.vector for face in faces])
        captions = [photo.caption or self.config.finetune.instance_prompt for photo in used]
        return EmbeddedPerson(
            position,
            person.identity,
            pictures=pictures,
            captions=tuple(captions) if any(photo.caption for photo in used) else None,
            face_boxes=np.stack(boxes),
            embedding=mean_embedding(vectors_PE),
            photo_embeddings=vectors_PE,
            photo_similarity=mean_pairwise_cosine(vectors_PE),
            photo_sha256=tuple(hashlib.sha256(photo.data or b"").hexdigest() for photo in used),
            consent=consent,
            failures=tuple(failures),
        )

    def _embed_photo(self, photo: RawPhoto, faults: list[PhotoReason]) -> tuple[bytes, np.ndarray, FaceEmbedding]:
        if photo.data is None:
            raise PhotoError(photo.reason, photo.error)
        pixels = load_photo_within(photo.data, max_pixels=self.config.photos.max_pixels, faults=faults)
        face = self.embedder.embed(pixels)
        upright, box = face.turn_upright(pixels)
        picture, box = square_picture(upright, self.picture_size, box, self.config.photos)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), box, face

    def _too_few(self, position: int, person: PersonRef, found: int, kept: int, failures: list[Failure]) -> Failure:
        if not found:
            message = f"no photo of this person at {self.source.uri}"
            return Failure(position, person.identity, None, "read", "no_photos", message)
        reasons = ", ".join(
            f"{number} × {reason}" for reason, number in Counter(f.reason for f in failures if f.stage != KEPT).items()
        )
        message = f"{kept} of {found} photos can be used, at least {self.config.photos.min_photos} are needed"
        message += f" ({reasons})" if reasons else ""
        return Failure(position, person.identity, None, "embed", "too_few_photos", message)


def square_picture(
    pixels_HW3: np.ndarray, size: int, box: np.ndarray, config: PhotoConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The square that the base model learns from, uint8 (size, size, 3), and the face's `box` (x1 y1 x2 y2) within it."""
    height, width = pixels_HW3.shape[:2]
    if config.crop == "centre":
        side = float(min(height, width))
        left, top = (width - side) / 2, (height - side) / 2
        picture = prepare_photo(pixels_HW3, size)
    else:
        side = min(float(min(height, width)), config.face_margin * float(max(box[2] - box[0], box[3] - box[1])))
        left = min(max(float(box[0] + box[2] - side) / 2, 0), width - side)
        top = min(max(float(box[1] + box[3] - side) / 2, 0), height - side)
        window = (left, top, left + side, top + side)
        picture = np.asarray(Image.fromarray(pixels_HW3).resize((size, size), Image.Resampling.LANCZOS, box=window))
    return picture, ((box - np.array([left, top, left, top])) * size / side).astype(np.float32)


def mean_pairwise_cosine(vectors_PE: np.ndarray) -> float:
    """Mean cosine of all pairs of unit vectors; NaN for a single one."""
    count = len(vectors_PE)
    if count < 2:
        return float("nan")
    total = vectors_PE.astype(np.float64).sum(0)
    return float((total @ total - count) / (count * (count - 1)))
