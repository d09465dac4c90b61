"""Ray Data's view of the evaluation: actors that hold the models embed held-out people and draw and score LoRAs.

Shared by evaluate.py and ablate.py. One block is one batch of LoRAs of one method.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from lora_diffusion.evaluation import EvaluationConfig, PhotoEmbedder, Scorer
from lora_diffusion.evaluation.held_out import EmbeddedPhotos, Floats, Setup
from lora_diffusion.evaluation.scoring import PersonScores, Request
from lora_diffusion.evaluation.wire import pack, unpack
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.jobs.local_ray import Need, rows_of
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel

LESS_MEMORY = "a smaller batch_people"


def needs(config: EvaluationConfig, where: str = "") -> list[Need]:
    """`where`: the section of the configuration that holds `config`."""
    return [Need("scoring", f"{where}worker_cpus and {where}worker_gpus", config.worker_cpus, config.worker_gpus)]


class OnRay:
    """`evaluation.pipeline.Workers` as pools of actors."""

    def embed(self, setup: Setup, people: Sequence[PersonRef]) -> Iterator[tuple[str, EmbeddedPhotos | str]]:
        texts = [json.dumps(dataclasses.asdict(person)) for person in people]
        tables = [pa.table({"person": texts[i : i + 4]}) for i in range(0, len(texts), 4)]
        for row in run(setup.config, tables, Embed, (setup,)):
            yield row["identity"], row["problem"] or unpack(EmbeddedPhotos, row["answer"])

    def score(
        self, setup: Setup, layout: LoRALayout, galleries_RKC: Floats, batches: Sequence[Sequence[Request]]
    ) -> Iterator[PersonScores]:
        tables = [pa.table({"request": [pack(request) for request in batch]}) for batch in batches]
        galleries = ray.put(galleries_RKC)
        for row in run(setup.config, tables, Score, (setup, layout.to_dict(), galleries)):
            yield unpack(PersonScores, row["answer"])


def run(config: EvaluationConfig, tables: list[pa.Table], work: type, arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Rows of `work(*arguments)(table)` for all tables, as they come. Lost workers are replaced without limit."""
    dataset = ray.data.from_arrow(tables).map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(len(tables), workers(config))),
        num_cpus=config.worker_cpus,
        num_gpus=config.worker_gpus or None,
        fn_constructor_args=arguments,
    )
    yield from rows_of(dataset)


class Embed:
    """Ray Data's view of `PhotoEmbedder`."""

    def __init__(self, setup: Setup) -> None:
        self.embed = PhotoEmbedder(setup, BaseModel.from_pretrained(setup.made.base).image_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for text in table["person"].to_pylist():
            person = PersonRef(**json.loads(text))
            answer = self.embed(person)
            problem, data = (answer, b"") if isinstance(answer, str) else ("", pack(answer))
            rows.append({"identity": person.identity, "problem": problem, "answer": data})
        return pa.Table.from_pylist(rows)


class Score:
    """Ray Data's view of `Scorer`."""

    def __init__(self, setup: Setup, layout: dict[str, Any], galleries: Any) -> None:
        self.score = Scorer(setup, LoRALayout.from_dict(layout), ray.get(galleries))

    def __call__(self, table: pa.Table) -> pa.Table:
        requests = [unpack(Request, data) for data in table["request"].to_pylist()]
        return pa.table({"answer": [pack(answer) for answer in self.score(requests)]})


def workers(config: EvaluationConfig) -> int:
    """Size of the pool: what was asked for, or what the cluster holds now."""
    if config.workers:
        return config.workers
    resources = ray.cluster_resources()
    if config.worker_gpus:
        return max(1, int(resources.get("GPU", 0) / config.worker_gpus + 1e-6))
    return max(1, int(resources.get("CPU", 1) / config.worker_cpus + 1e-6))
