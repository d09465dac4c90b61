"""How much of some people their LoRAs carry over, when a synthesiser saw only the first photos of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_diffusion.evaluation.held_out import Floats
from lora_diffusion.evaluation.similarity import RenderConfig, draw_people, similarity_report
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, embed_pictures
from lora_diffusion.faces.unit import unit
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.lora.photo_data import PersonPhotos

RECOGNISERS = {"recogniser": "tiny", "second_recogniser": "tiny-b"}


def embedders(threads: int) -> dict[str, FaceEmbedder]:
    return {
        name: FaceEmbedder(EmbedderConfig(model, several_faces="largest", threads=threads))
        for name, model in RECOGNISERS.items()
    }


class Judge:
    """Draws LoRAs of `people` and compares the pictures with all photos but the first `inputs`, by both recognisers."""

    def __init__(
        self,
        maker: LoRAMaker,
        config: CorpusConfig,
        people: Sequence[PersonPhotos],
        by: dict[str, FaceEmbedder],
        inputs: int = 1,
    ) -> None:
        self.base, self.bank, self.embedders = maker.base, maker.finetuner.bank, by
        found = {name: [embed_pictures(e, person.pixels) for person in people] for name, e in by.items()}
        self.galleries = {name: [rows[inputs:][seen[inputs:]] for rows, seen in some] for name, some in found.items()}
        self.found = next(iter(found.values()))
        self.scene = RenderConfig(
            guidance_scale=config.score.guidance_scale, num_inference_steps=config.score.num_inference_steps
        )
        base_pictures = draw_people(self.base, self.bank, None, self.scene)[0]
        self.base_PE = {name: embed_pictures(embedder, base_pictures)[0] for name, embedder in by.items()}

    def faces(self, count: int = 1) -> Floats:
        """(K, C) mean embedding of the first `count` photos by the first recogniser; of all photos where those have no face."""
        chosen = [rows[:count][seen[:count]] if seen[:count].any() else rows[seen] for rows, seen in self.found]
        return unit(np.stack([rows.mean(0) for rows in chosen]))

    def __call__(self, vectors_KN: np.ndarray) -> dict[str, float]:
        """Mean similarity with the person's photos and rank-1 among these people, for each recogniser."""
        pictures = draw_people(self.base, self.bank, vectors_KN, self.scene)
        row = {}
        for name, embedder in self.embedders.items():
            report = similarity_report(*embed_pictures(embedder, pictures), self.base_PE[name], self.galleries[name])
            row |= {name: round(report.own.mean, 4), f"{name}_rank1": round(report.rank1, 3)}
        return row
