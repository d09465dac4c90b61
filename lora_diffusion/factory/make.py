"""Embedded people -> fine-tuned and scored LoRAs, K at a time, on one base model that is loaded once.

Axes: K people of a group, N length of a LoRA vector, E embedding.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from lora_diffusion.config import to_dict
from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.schema import KEPT, Failure, Person
from lora_diffusion.faces.crops import CROP_SIZE
from lora_diffusion.faces.embedder import FaceEmbedder, folder_fingerprint
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.errors import BrokenDeviceError, CommonFault, DeviceError, out_of_memory
from lora_diffusion.factory.score import Scorer
from lora_diffusion.lora.finetune import Finetuner
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.shared_start import load_start
from lora_diffusion.models.stable_diffusion import BaseModel

_CLASS_SEED = 500_000  # far from those of scoring, and from what a user would type


class Maker(Protocol):
    """What a worker needs of a `LoRAMaker`."""

    def manifest(self, there: Manifest | None = None) -> Manifest: ...

    def __call__(self, people: Sequence[EmbeddedPerson]) -> list[Person | Failure]: ...


class LoRAMaker:
    """Holds the base model, its LoRA layout and a recogniser; makes corpus rows of groups of people.

    Raises ValueError if the base model, the recogniser or the LoRA's target modules are not what they should be.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.base = BaseModel.from_pretrained(config.base, config.device, getattr(torch, config.dtype))
        lora = config.lora
        self.layout = LoRALayout.from_unet(self.base.unet, lora.rank, lora.target_modules, lora.alpha)
        self.start_1N = None if lora.start is None else load_start(lora.start, self.layout, self.base)[None]
        self.embedder = FaceEmbedder(config.embedder)
        self.scorer = Scorer(self.base, self.embedder, config.score)
        self.together = config.people_per_group  # K that fits into the memory, as far as was tried

    @cached_property
    def finetuner(self) -> Finetuner:
        count = self.config.class_images
        pictures = None
        if count:
            prompts = [self.config.finetune.class_prompt] * count
            pictures = self.scorer.draw(None, prompts, range(_CLASS_SEED, _CLASS_SEED + count))
        return Finetuner(self.base, self.layout, self.config.finetune, class_pixels=pictures)

    def manifest(self, there: Manifest | None = None) -> Manifest:
        """What a corpus of this configuration is made with.

        `there`: of the corpus to be continued; if an earlier release began it, the base model is called as it was then.
        """
        old = there.base["fingerprint"] if there is not None else ""
        return Manifest(
            layout=self.layout.to_dict(),
            base={"name": self.config.base, "fingerprint": old if self.base.knows(old) else self.base.fingerprint},
            recogniser={"name": self.config.embedder.model, "fingerprint": self.embedder.fingerprint},
            recipe=self.config.recipe(
                folder_fingerprint(self.config.embedder),
                None if self.start_1N is None else hashlib.sha256(self.start_1N.numpy().tobytes()).hexdigest()[:16],
            ),
            config=to_dict(self.config),
            consent=True,
        )

    def try_out(self) -> None:
        """One small step of all the work on noise, so that what is wrong for everybody shows before anybody is touched.

        Seconds on a CPU, whatever the size of the base's pictures. Raises CommonFault. Leaves a bank on the UNet: make
        another maker for the work.
        """
        side = min(64, self.base.image_size)
        noise_1HW3 = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
        photos = PersonPhotos("noise", noise_1HW3, face_boxes=np.array([[0, 0, side, side]], np.float32))
        once = replace(self.config.finetune, steps=1, compile=False)
        try:
            finetuner = Finetuner(self.base, self.layout, once, noise_1HW3 if self.config.class_images else None)
            tuned = finetuner([photos], self.start_1N)
            self.base.decode(self.base.encode_images(noise_1HW3))
            self.base.encode_prompts(list(self.config.score.prompts) or [""])
            self.embedder.embed_batch(noise_1HW3)
            self.embedder.embed_crops(np.zeros((1, CROP_SIZE, CROP_SIZE, 3), np.uint8))
        except Exception as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise CommonFault(f"a step of fine-tuning and scoring fails on pictures of noise: {said}") from error
        if tuned.diverged_K[0]:
            raise CommonFault(
                f"a first step of fine-tuning on pictures of noise has no finite loss or gradient in {self.config.dtype}: "
                "try dtype=float32, and look at the base model and lora.start"
            )

    def __call__(self, people: Sequence[EmbeddedPerson]) -> list[Person | Failure]:
        """One answer for each of `people`, all usable. Raises what their data makes torch raise; DeviceError otherwise.

        Where memory does not hold them together they are made in halves, and so are all groups after them: the LoRAs are
        the same, to float error.
        """
        answers: list[Person | Failure] = []
        while left := people[len(answers) :]:
            some = left[: self.together]
            try:
                answers += self._together(some)
                continue
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise DeviceError(
                        "the memory does not hold the fine-tuning of one person: finetune.gradient_checkpointing=true, or less of "
                        f"finetune.batch_size, score.max_batch or score.seeds_per_prompt, needs less. {_first_line(error)}"
                    ) from error
            self.together = math.ceil(len(some) / 2)
            gc.collect()  # here the error is gone, which held what did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return answers

    @property
    def note(self) -> str:
        """For the user, where fewer people fit than were asked for."""
        if self.together == self.config.people_per_group:
            return ""
        return (
            f"the memory does not hold people_per_group={self.config.people_per_group} together: {self.together} at a time from "
            "here on. The LoRAs are the same, to float error"
        )

    def _together(self, people: Sequence[EmbeddedPerson]) -> list[Person | Failure]:
        try:
            tuned = self.finetuner([person.photos() for person in people], self.start_1N)
            start = time.perf_counter()
            photos_KE = np.stack([person.embedding for person in people if person.embedding is not None])
            similarity_K, base_similarity_K = self.scorer(photos_KE, tuned.vectors_KN, self.finetuner.bank)
            score_seconds = time.perf_counter() - start
        except RuntimeError as error:
            accelerator = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
            if accelerator and not out_of_memory(error):
                raise BrokenDeviceError(f"the accelerator failed: {error}") from error
            raise
        answers: list[Person | Failure] = []
        for k, person in enumerate(people):
            if tuned.diverged_K[k] or not np.isfinite(tuned.vectors_KN[k].astype(self.config.vector_dtype)).all():
                message = f"fine-tuning diverged (loss {tuned.loss_K[k]:.3g}): lower finetune.learning_rate"
                answers.append(Failure(person.position, person.identity, None, "finetune", "diverged", message))
                continue
            gate = self.config.score.min_similarity
            if gate is not None and not similarity_K[k] >= gate:
                message = f"similarity of the renders is {similarity_K[k]:.3f}, score.min_similarity is {gate}"
                answers.append(Failure(person.position, person.identity, None, "score", "low_similarity", message))
                continue
            assert person.embedding is not None
            assert person.photo_embeddings is not None
            answers.append(
                Person(
                    position=person.position,
                    identity=person.identity,
                    vector=tuned.vectors_KN[k],
                    embedding=person.embedding,
                    photo_embeddings=person.photo_embeddings,
                    similarity=float(similarity_K[k]),
                    base_similarity=float(base_similarity_K[k]),
                    photo_similarity=person.photo_similarity,
                    loss=float(tuned.loss_K[k]),
                    steps=tuned.steps,
                    seed=self.config.finetune.seed,
                    num_photos=len(person.pictures),
                    num_photos_dropped=sum(f.photo is not None and f.stage != KEPT for f in person.failures),
                    photo_sha256=person.photo_sha256,
                    embed_seconds=person.seconds,
                    finetune_seconds=tuned.seconds / len(people),
                    score_seconds=score_seconds / len(people),
                    consent=person.consent,
                )
            )
        return answers


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
