"""The people that are asked about: a photo to condition on, other photos to compare with, and their fine-tuned LoRA.

The photos that a render is compared with are never the one that it was made from: an embedding of that very photo would
also reward what pose and light leave in it. The fine-tuned LoRA saw all photos, so as a ceiling it is on the generous side.

Axes: K people, Q photos, R recognisers, C embedding (512), N vector length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.artifacts.identity import Identity, Mismatch
from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader, matrix
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.embedder import FaceEmbedder
from lora_diffusion.faces.photos import PhotoError, load_photo
from lora_diffusion.faces.unit import unit
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import square_picture
from lora_diffusion.factory.people import PersonRef, RawPhoto, open_people
from lora_diffusion.factory.planning import people_folder

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def corpus_config(reader: CorpusReader, config: EvaluationConfig) -> CorpusConfig:
    """How the held-out corpus was made, with this evaluation's photos and base model where it names others."""
    kept = {key: value for key, value in reader.manifest.config.items() if key != "render_people"}  # of older corpora
    made = from_dict(CorpusConfig, kept)
    people = config.people or people_folder(made.people, reader.store.uri)
    base = config.base or made.base
    return replace(made, people=people, base=base, device=config.device, output=reader.store.uri)


@dataclass(frozen=True)
class Setup:
    """What all workers of an evaluation know. made: how the held-out corpus was made; identity: of the corpus that was learned
    from."""

    config: EvaluationConfig
    made: CorpusConfig
    identity: Identity


@dataclass(frozen=True, eq=False)
class EmbeddedPhotos:
    """One person. `galleries_RC`: mean of the photos that were not conditioned on, by each recogniser, unit length.

    `photo_similarity_R`: cosine of each such photo with the mean of the others, meaned: what a perfect render could reach;
    NaN if there is only one.
    """

    identity: str
    condition_C: Floats
    galleries_RC: Floats
    photo_similarity_R: Floats
    photo: Pixels


class PhotoEmbedder:
    """Reads one held-out person's photos; one for each worker. Recognisers: the conditioning one, then the second.

    Faces are found in the photos as they are, as `Synthesizer.from_photo` does, not in the base model's small squares.
    Raises ValueError for another recogniser than that of the corpus.
    """

    def __init__(self, setup: Setup, picture_size: int) -> None:
        self.count, self.photos, self.picture_size = setup.config.condition_photos, setup.made.photos, picture_size
        self.source = open_people(setup.made.people)
        self.embedders = recognisers(setup)

    def __call__(self, person: PersonRef) -> EmbeddedPhotos | str:
        """The person, or why they cannot be asked about."""
        if person.problem is not None:
            return person.problem[1]
        good = [found for photo in self.source.photos(person, self.photos.max_photos) if (found := self._read(photo))]
        if len(good) <= self.count:
            return (
                f"{len(good)} photos with a face that all recognisers find; {self.count} to condition on and one more to "
                "compare with are needed"
            )
        vectors_RQC = np.stack([vectors_RC for _, vectors_RC in good], axis=1)
        others_RQC = vectors_RQC[:, self.count :]
        return EmbeddedPhotos(
            person.identity,
            unit(vectors_RQC[0, : self.count].mean(0)),
            unit(others_RQC.mean(1)),
            np.array([_among_themselves(photos_QC) for photos_QC in others_RQC], np.float32),
            good[0][0],
        )

    def _read(self, photo: RawPhoto) -> tuple[Pixels, Floats] | None:
        """The square picture and the embeddings (R, C) of a photo, or None if it cannot be used."""
        if photo.data is None:
            return None
        try:
            pixels = load_photo(photo.data, max_pixels=self.photos.max_pixels)
            faces = [embedder.embed(pixels) for embedder in self.embedders]
        except (PhotoError, FaceError):
            return None
        upright, box = faces[0].turn_upright(pixels)
        picture, _ = square_picture(upright, self.picture_size, box, self.photos)
        return picture, np.stack([face.vector for face in faces])


def recognisers(setup: Setup) -> list[FaceEmbedder]:
    """The one that conditions, and one that conditioned nothing. Of several faces in a render the largest counts.

    Raises ValueError if the first is not the corpus', or the second is.
    """
    embedder = replace(setup.made.embedder, several_faces="largest")
    second = setup.config.second_recogniser
    found = [FaceEmbedder(embedder)]
    setup.identity.check_recogniser(found[0], "the corpus")
    if second:
        found.append(FaceEmbedder(replace(embedder, model=second)))
        if found[1].fingerprint == found[0].fingerprint:
            raise ValueError(
                f"second_recogniser is {second}, the one that the corpus was made with: its similarities would "
                "confirm themselves. Name another one, or null"
            )
    return found


@dataclass(frozen=True, eq=False)
class HeldOut:
    """K people in the order of their corpus. `vectors_KN`: fine-tuned; the rest as in `EmbeddedPhotos`."""

    identities: tuple[str, ...]
    vectors_KN: Floats
    conditions_KC: Floats
    galleries_RKC: Floats
    photo_similarity_RK: Floats
    photos_KHWC: Pixels
    left_out: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.identities)

    @property
    def key(self) -> str:
        """16 hex digits over who is asked about and with which embeddings they are compared."""
        parts = ["\0".join(self.identities).encode(), self.galleries_RKC.tobytes(), self.conditions_KC.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def choose(reader: CorpusReader, other: CorpusReader, limit: int | None) -> tuple[list[str], Floats]:
    """Who is asked about, and their fine-tuned vectors (K, N). Raises ValueError if the two corpora do not fit."""
    mine, theirs = reader.manifest, other.manifest
    names = f"the corpus at {other.store.uri}", f"the held-out corpus at {reader.store.uri}"
    theirs.identity.check(mine.identity, *names, "Build both with the same configuration")
    if lines := theirs.recipe_differences(mine):
        raise Mismatch(f"{names[1]} was not fine-tuned as {names[0]}: {'; '.join(lines)}. Build both alike")
    table = reader.table(["identity", "vector"])
    if len(table) < 2:
        raise ValueError(f"{reader.store.uri} has {len(table)} people with a LoRA; at least 2 are needed")
    table = table.slice(0, limit)
    identities = table["identity"].to_pylist()
    shared = sorted(set(identities) & set(other.identities))
    if shared:
        raise ValueError(
            f"{len(shared)} held-out people are in the corpus too ({', '.join(shared[:3])}): nothing could be learned from them"
        )
    return identities, matrix(table["vector"]).astype(np.float32)


def gather(identities: Sequence[str], vectors_KN: Floats, answers: Mapping[str, EmbeddedPhotos | str]) -> HeldOut:
    """Put what workers found in any order into one table. Raises ValueError if fewer than two people are left."""
    keep = [k for k, name in enumerate(identities) if isinstance(answers.get(name), EmbeddedPhotos)]
    left_out = {
        n: str(answers.get(n, "no answer")) for n in identities if not isinstance(answers.get(n), EmbeddedPhotos)
    }
    if len(keep) < 2:
        raise ValueError(f"{len(keep)} held-out people can be asked about, at least 2 are needed; left out: {left_out}")
    people = [answer for k in keep if isinstance(answer := answers[identities[k]], EmbeddedPhotos)]
    return HeldOut(
        tuple(person.identity for person in people),
        vectors_KN[keep],
        np.stack([person.condition_C for person in people]),
        np.stack([person.galleries_RC for person in people], axis=1),
        np.stack([person.photo_similarity_R for person in people], axis=1),
        np.stack([person.photo for person in people]),
        left_out,
    )


def _among_themselves(photos_QC: Floats) -> float:
    count = len(photos_QC)
    if count < 2:
        return float("nan")
    rest = unit((photos_QC.sum(0, keepdims=True) - photos_QC) / (count - 1))
    return float((photos_QC * rest).sum(1).mean())
