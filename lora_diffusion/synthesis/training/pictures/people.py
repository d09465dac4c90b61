"""Photos of people for the stage `pictures`: latents, embeddings, captions, made once on each machine and kept private.

Axes: T photos of all people, B people, V photos of one, E embedding, R recognisers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_diffusion.config import to_dict
from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.unit import unit
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson, PersonEmbedder
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.training.pictures_config import PicturesConfig
from lora_diffusion.synthesis.training.private import private_folder

DEFAULT_PROMPT = "a photo of sks person"
GROUP = 16  # people between two words about progress


class PhotoCache:
    """A folder that only its owner can read. One process of a machine makes it (`fill`), all of them read (`open`)."""

    def __init__(
        self, config: PicturesConfig, recogniser: str, base: BaseModel, root: str | Path, output: str = ""
    ) -> None:
        """output: of the run that it is for, which removes it at its end."""
        self.config, self.recogniser, self.base = config, recogniser, base
        what: dict[str, Any] = {"people": config.people, "max": config.max_people, "photos": to_dict(config.photos)}
        what |= {"recognisers": [recogniser, config.second_recogniser], "base": base.fingerprint}
        what |= {"validation_people": config.validation_people, "output": output}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root) / f"pictures-{key}"

    @property
    def complete(self) -> bool:
        return (self.folder / "people.json").exists()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Raises ValueError if too few people have a usable photo. A person with one photo gets its mirror image beside it."""
        self.remove()
        private_folder(self.folder)
        embedder = EmbedderConfig(model=self.recogniser)
        corpus = CorpusConfig(people=self.config.people, output="", photos=self.config.photos, embedder=embedder)
        work = PersonEmbedder(corpus, self.base.image_size)
        listed = sorted(work.source.list_people(), key=lambda person: person.identity)[: self.config.max_people]
        latents, captions, names, counts, digest = [], [], [], [], hashlib.sha256()
        embeddings: list[np.ndarray] = []
        failures: Counter[str] = Counter()
        for place, person in enumerate(listed):
            if place % (GROUP * 4) == 0 and place:
                say(f"photos: {place:,} of {len(listed):,} people")
            found = work(place, person)
            failures.update(failure.reason for failure in found.failures)
            if not found.usable:
                continue
            pixels_V, vectors_VE, words_V = _photos(found, work.embedder)
            latents.append(self.base.encode_images(pixels_V).cpu().numpy())
            embeddings.append(np.stack([vectors_VE, np.zeros_like(vectors_VE)], 1))
            captions += words_V
            names.append(person.identity)
            counts.append(len(pixels_V))
            digest.update(json.dumps([person.identity, *found.photo_sha256]).encode())
        need = self.config.validation_people + 2
        if len(names) < need:
            told = ", ".join(f"{count} × {reason}" for reason, count in failures.items()) or "nothing else"
            raise ValueError(
                f"{len(names)} of {len(listed)} people of {self.config.people} have a usable photo ({told}); at least {need} "
                "are needed: lower pictures.validation_people, or give more people"
            )
        if self.config.second_recogniser:
            judge = FaceEmbedder(EmbedderConfig(self.config.second_recogniser, several_faces="largest"))
            by_name = {person.identity: person for person in listed}
            for place in split(names, self.config.validation_people)[1]:
                pixels_V, vectors_VE, _ = _photos(work(0, by_name[names[place]]), work.embedder)
                embeddings[place][:, 1] = _embedded(judge, pixels_V, np.zeros_like(vectors_VE))
        np.save(self.folder / "latents.npy", np.concatenate(latents))
        np.save(self.folder / "embeddings.npy", np.concatenate(embeddings))
        about = {"names": names, "counts": counts, "captions": captions, "digest": digest.hexdigest()[:16]}
        (self.folder / "people.json").write_text(json.dumps({**about, "failures": dict(failures)}))
        left = ", ".join(f"{count} × {reason}" for reason, count in failures.items()) or "none"
        say(f"photos: {sum(counts):,} of {len(names):,} people; left out: {left}")

    def open(self) -> People:
        private_folder(self.folder)
        about = json.loads((self.folder / "people.json").read_text())
        latents, embeddings = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "embeddings")
        )
        return People(
            latents, embeddings, about["counts"], about["captions"], about["names"], about["digest"], self.config
        )


def split(names: list[str], validation_people: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of those who train and of those who validate: the names alone decide."""
    order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names], kind="stable")
    return np.sort(order[validation_people:]), np.sort(order[:validation_people])


def _photos(person: EmbeddedPerson, embedder: FaceEmbedder) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels, embeddings and captions; of who has one photo, the mirrored one beside it."""
    pixels_V = person.photos().pixels
    assert person.photo_embeddings is not None
    vectors_VE, words = person.photo_embeddings, list(person.captions or [DEFAULT_PROMPT] * len(pixels_V))
    if len(pixels_V) == 1:
        mirrored = np.ascontiguousarray(pixels_V[:, :, ::-1])
        pixels_V, words = np.concatenate([pixels_V, mirrored]), words * 2
        vectors_VE = np.concatenate([vectors_VE, _embedded(embedder, mirrored, vectors_VE)])
    return pixels_V, vectors_VE, words


def _embedded(embedder: FaceEmbedder, pixels_V: np.ndarray, otherwise_VE: np.ndarray) -> np.ndarray:
    found = embedder.embed_batch(pixels_V)
    return np.stack([o if isinstance(f, FaceError) else f.vector for f, o in zip(found, otherwise_VE, strict=True)])


class People:
    """The people of a cache: `train` and `validation` are their places. The second recogniser saw only the latter."""

    def __init__(
        self,
        latents_T: np.ndarray,
        embeddings_TRE: np.ndarray,
        counts: list[int],
        captions: list[str],
        names: list[str],
        digest: str,
        config: PicturesConfig,
    ) -> None:
        self.latents_T, self.embeddings_TRE, self.digest = latents_T, embeddings_TRE, digest
        self.counts_P = np.array(counts)
        self.starts_P = np.cumsum(self.counts_P) - self.counts_P
        self.prompts = sorted(set(captions))
        places = {prompt: place for place, prompt in enumerate(self.prompts)}
        self.prompt_T = np.array([places[caption] for caption in captions])
        self.train, self.validation = split(names, config.validation_people)

    def photos(self, places_B: np.ndarray, picks_BV: np.ndarray) -> Tensor:
        """Latents (B, V, C, H, W) of the picked photos of each person."""
        return torch.from_numpy(np.asarray(self.latents_T[self._at(places_B, picks_BV)], np.float32))

    def prompts_of(self, places_B: np.ndarray, picks_BV: np.ndarray) -> np.ndarray:
        """Numbers (B, V) of their prompts."""
        return np.asarray(self.prompt_T[self._at(places_B, picks_BV)])

    def embeddings(self, places_B: np.ndarray, picks_BV: np.ndarray) -> Tensor:
        """(B, V, E) by the recogniser that teaches, of length 1."""
        return torch.from_numpy(np.asarray(self.embeddings_TRE[self._at(places_B, picks_BV), 0]))

    def _at(self, places_B: np.ndarray, picks_BV: np.ndarray) -> np.ndarray:
        return np.asarray(self.starts_P[places_B][:, None] + picks_BV)

    def faces(self, places_B: np.ndarray, shown_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """The embedding of the shown photo (B, E), and by each recogniser the mean of the person's other photos (B, R, E)."""
        shown, others = [], []
        for place, photo in zip(places_B, shown_B, strict=True):
            mine_VRE = self.embeddings_TRE[self.starts_P[place] :][: self.counts_P[place]]
            rest_RE = np.delete(mine_VRE, photo, axis=0).sum(0)
            shown.append(mine_VRE[photo, 0])
            others.append(unit(rest_RE))
        return torch.from_numpy(np.stack(shown)), torch.from_numpy(np.stack(others))
