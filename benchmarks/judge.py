"""How much of some people their LoRAs carry over, when a synthesiser saw only the first photo of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_diffusion.evaluation.similarity import RenderConfig, draw_people, similarity_report
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, embed_pictures
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
    """Draws LoRAs of `people` and compares the pictures with all photos but the first, by both recognisers.

    faces_KC: embedding of the first photo by the first recogniser; of all photos where it has no face.
    """

    def __init__(
        self, maker: LoRAMaker, config: CorpusConfig, people: Sequence[PersonPhotos], by: dict[str, FaceEmbedder]
    ) -> None:
        self.base, self.bank, self.embedders = maker.base, maker.finetuner.bank, by
        found = {name: [embed_pictures(e, person.pixels) for person in people] for name, e in by.items()}
        self.galleries = {name: [rows[1:][seen[1:]] for rows, seen in some] for name, some in found.items()}
        self.faces_KC = np.stack(
            [rows[0] if seen[0] else rows[seen].mean(0) for rows, seen in next(iter(found.values()))]
        )
        self.scene = RenderConfig(
            guidance_scale=config.score.guidance_scale, num_inference_steps=config.score.num_inference_steps
        )
        base_pictures = draw_people(self.base, self.bank, None, self.scene)[0]
        self.base_PE = {name: embed_pictures(embedder, base_pictures)[0] for name, embedder in by.items()}

    def __call__(self, vectors_KN: np.ndarray) -> dict[str, float]:
        """Mean similarity with the person's photos and rank-1 among these people, for each recogniser."""
        pictures = draw_people(self.base, self.bank, vectors_KN, self.scene)
        row = {}
        for name, embedder in self.embedders.items():
            report = similarity_report(*embed_pictures(embedder, pictures), self.base_PE[name], self.galleries[name])
            row |= {name: round(report.own.mean, 4), f"{name}_rank1": round(report.rank1, 3)}
        return row
