"""One path for every method: LoRA vectors -> pictures -> embeddings -> scores. Work of one worker, without Ray.

All methods draw person k with the same prompts and the same noise, other noise than person j's: methods are compared pair
by pair, and intervals over people hold the chance of the noise as well. The base model is the zero vector.

What leaves a worker are cosines, not embeddings.

Axes: K held-out people, S LoRAs of one person, P pictures by each, R recognisers, C embedding, N vector length, H parts of a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from lora_diffusion.artifacts import checksum
from lora_diffusion.config import to_dict
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.evaluation.held_out import Floats, Pixels, Setup, recognisers
from lora_diffusion.evaluation.methods import Method
from lora_diffusion.evaluation.similarity import RenderConfig, nearest_own
from lora_diffusion.faces.embedder import embed_pictures
from lora_diffusion.faces.unit import unit
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.rendering import PROMPT_PARTS, load_prompt_scorer, render
from lora_diffusion.models.stable_diffusion import BaseModel

NOT_ASKED = -1


@dataclass(frozen=True, eq=False)
class Request:
    """Draw the LoRAs (S, N) of held-out person number `person`."""

    method: str
    person: int
    vectors_SN: Floats


@dataclass(frozen=True, eq=False)
class PersonScores:
    """cosines_RTK: of each of the T = S P pictures with the gallery of every held-out person; 0 where no face was found.

    hits_TH: 1 if the scene shows what the prompt asked for, 0 if not, -1 if it did not ask. `diversity_R`: 1 - mean cosine
    between pictures of the same prompt and noise by different LoRAs of this person, where both show a face; NaN if none do.
    """

    method: str
    person: int
    cosines_RTK: Floats
    found_RT: NDArray[np.bool_]
    hits_TH: NDArray[np.int8]
    diversity_R: Floats
    pictures_PHWC: Pixels


class Scorer:
    """Holds base model, recognisers and prompt scorer. `galleries_RKC`: what renders are compared with.

    Raises ValueError for another base model or recogniser than those of the corpus.
    """

    def __init__(self, setup: Setup, layout: LoRALayout, galleries_RKC: Floats) -> None:
        config = setup.config
        self.render, self.keep = config.render, config.pictures_people
        self.batch = config.batch_people
        self.base = BaseModel.from_pretrained(setup.made.base, config.device)
        setup.identity.check_base(self.base, "the corpus")
        self.bank = LoRABank(self.base.unet, layout)
        self.embedders = recognisers(setup)
        self.galleries_RKC = galleries_RKC
        self.prompt_scorer = load_prompt_scorer(config.prompt_scorer)

    def __call__(self, requests: Sequence[Request]) -> list[PersonScores]:
        """One answer for each request, in order; all LoRAs are drawn together."""
        vectors = np.concatenate([request.vectors_SN for request in requests])
        owners = np.repeat([request.person for request in requests], [len(r.vectors_SN) for r in requests])
        prompts, seeds = pictures_of(self.render, owners)
        each = len(self.render.pictures()[0])
        pictures = render(
            self.base,
            vectors,
            prompts,
            seeds,
            bank=self.bank,
            num_inference_steps=self.render.num_inference_steps,
            guidance_scale=self.render.guidance_scale,
            sampler=self.render.sampler,
            max_batch=each * self.batch,
        )
        embedded = [embed_pictures(embedder, pictures) for embedder in self.embedders]
        hits = self._hits(pictures, prompts)
        answers, start = [], 0
        for request in requests:
            samples = len(request.vectors_SN)
            mine = slice(start, start + samples * each)
            start = mine.stop
            answers.append(
                PersonScores(
                    request.method,
                    request.person,
                    np.stack([e[mine] @ g.T for (e, _), g in zip(embedded, self.galleries_RKC, strict=True)]),
                    np.stack([found[mine] for _, found in embedded]),
                    hits[mine],
                    np.array(
                        [
                            _diversity(e[mine].reshape(samples, each, -1), f[mine].reshape(samples, each))
                            for e, f in embedded
                        ],
                        np.float32,
                    ),
                    pictures[mine][:each] if request.person < self.keep else pictures[:0],
                )
            )
        return answers

    def _hits(self, pictures: Pixels, prompts: Sequence[str]) -> NDArray[np.int8]:
        if self.prompt_scorer is None:
            return np.full((len(pictures), len(PROMPT_PARTS)), NOT_ASKED, np.int8)
        return self.prompt_scorer.hits(pictures, prompts)


def pictures_of(config: RenderConfig, people: Sequence[int] | NDArray[Any]) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the pictures of each LoRA of `people`, which are held-out people's numbers."""
    prompts, seeds = config.pictures()
    return prompts * len(people), [seed + int(person) * len(seeds) for person in people for seed in seeds]


def _diversity(embeddings_SPC: Floats, found_SP: NDArray[np.bool_]) -> float:
    """1 - mean cosine of all pairs of samples, at the same prompt and noise, where both show a face; NaN if there are none."""
    vectors = unit(embeddings_SPC)
    cosines_PSS = np.einsum("spc,tpc->pst", vectors, vectors)
    both_PSS = np.einsum("sp,tp->pst", found_SP, found_SP) & ~np.eye(len(vectors), dtype=bool)
    return float(1 - cosines_PSS[both_PSS].mean()) if both_PSS.any() else float("nan")


@dataclass(frozen=True, eq=False)
class Scores:
    """All people of one method; axes as in `PersonScores`, with K in front. `people_K`: numbers of the held-out people."""

    people_K: NDArray[np.int64]
    cosines_KRTJ: Floats
    found_KRT: NDArray[np.bool_]
    hits_KTH: NDArray[np.int8]
    diversity_KR: Floats
    pictures_KPHWC: Pixels

    @classmethod
    def of(cls, answers: Sequence[PersonScores]) -> Scores:
        """From the answers of one method in any order."""
        rows = sorted(answers, key=lambda answer: answer.person)
        shown = [row.pictures_PHWC for row in rows if len(row.pictures_PHWC)]
        return cls(
            np.array([row.person for row in rows], np.int64),
            np.stack([row.cosines_RTK for row in rows]),
            np.stack([row.found_RT for row in rows]),
            np.stack([row.hits_TH for row in rows]),
            np.stack([row.diversity_R for row in rows]),
            np.stack(shown) if shown else np.zeros((0, 0, 0, 0, 3), np.uint8),
        )

    def to_bytes(self) -> bytes:
        """safetensors."""
        tensors = {name: np.ascontiguousarray(value) for name, value in vars(self).items()}
        return checksum.seal(safetensors.numpy.save(tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> Scores:
        """Inverse of `to_bytes`. Raises ValueError for anything else."""
        try:
            checksum.check(data)
            return cls(**safetensors.numpy.load(data))
        except Exception as error:  # each damage has its own class there
            raise ValueError(f"no scores of an evaluation: {error or type(error).__name__}") from error

    def similarity_K(self, recogniser: int = 0) -> Floats:
        """(K,) mean cosine of a person's renders with their own gallery."""
        rows = np.arange(len(self.people_K))
        return np.asarray(self.cosines_KRTJ[rows, recogniser, :, self.people_K].mean(1), np.float32)

    def others_K(self, recogniser: int = 0) -> Floats:
        """(K,) mean cosine of a person's renders with everybody else's gallery."""
        mean_KJ = self.cosines_KRTJ[:, recogniser].mean(1)
        own_K = mean_KJ[np.arange(len(mean_KJ)), self.people_K]
        return np.asarray((mean_KJ.sum(1) - own_K) / max(1, mean_KJ.shape[1] - 1), np.float32)

    def rank1_K(self, recogniser: int = 0) -> Floats:
        """(K,) 1 where the mean of the renders lies nearer to the person's own gallery than to anybody else's; 0 without a face."""
        return nearest_own(self.cosines_KRTJ[:, recogniser].mean(1), self.people_K)

    def prompt_accuracy_KH(self) -> Floats:
        """(K, H) share of pictures that obey, NaN where no prompt asks."""
        asked = self.hits_KTH != NOT_ASKED
        count = asked.sum(1)
        right = (self.hits_KTH == 1).sum(1)
        return np.asarray(np.where(count > 0, right / np.maximum(count, 1), np.nan), np.float32)


def score_key(method: Method, config: EvaluationConfig, held_out: str, base_fingerprint: str, layout_id: str) -> str:
    """Names the scores of a method by all that decides them: the same key, the same scores."""
    settings = {
        "render": to_dict(config.render),
        "second": config.second_recogniser,
        "held_out": held_out,
        "base": base_fingerprint,
        "layout": layout_id,
        "pictures": config.pictures_people,
    }
    if config.prompt_scorer is not None:
        settings["prompt_scorer"] = config.prompt_scorer
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(method.people_K.tobytes())
    digest.update(np.asarray(method.vectors_KSN, np.float32).tobytes())
    return digest.hexdigest()[:16]
