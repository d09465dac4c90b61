"""Ray Data's view of the evaluation: actors that hold the models embed held-out people and draw and score LoRAs.

Shared by jobs/evaluate.py and jobs/ablate.py. One block is one batch of LoRAs, of whatever methods.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from lora_diffusion.evaluation import EvaluationConfig, PhotoEmbedder, Scorer
from lora_diffusion.evaluation.held_out import EmbeddedPhotos, Floats
from lora_diffusion.evaluation.scoring import PersonScores, Request
from lora_diffusion.evaluation.wire import pack, unpack
from lora_diffusion.factory import CorpusConfig, PersonRef
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import StoreError

USER_ERRORS = (ValueError, StoreError)
# Workers on other machines have the package, but not this folder on their path.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class OnRay:
    """`evaluation.pipeline.Workers` as pools of actors."""

    def embed(
        self, config: EvaluationConfig, made: CorpusConfig, people: Sequence[PersonRef]
    ) -> Iterator[tuple[str, EmbeddedPhotos | str]]:
        texts = [json.dumps(dataclasses.asdict(person)) for person in people]
        tables = [pa.table({"person": texts[i : i + 4]}) for i in range(0, len(texts), 4)]
        for row in run(config, tables, Embed, (config, made)):
            yield row["identity"], row["problem"] or unpack(EmbeddedPhotos, row["answer"])

    def score(
        self,
        config: EvaluationConfig,
        made: CorpusConfig,
        layout: LoRALayout,
        galleries_RKC: Floats,
        batches: Sequence[Sequence[Request]],
    ) -> Iterator[PersonScores]:
        tables = [pa.table({"request": [pack(request) for request in batch]}) for batch in batches]
        galleries = ray.put(galleries_RKC)
        for row in run(config, tables, Score, (config, made, layout.to_dict(), galleries)):
            yield unpack(PersonScores, row["answer"])


def run(config: EvaluationConfig, tables: list[pa.Table], work: type, arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Rows of `work(*arguments)(table)` for all tables, as they come. Lost workers are replaced without limit."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = None  # a batch stays whole
    context.raise_original_map_exception = True  # so that `find_cause` finds it
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow(tables).map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(len(tables), workers(config))),
        num_cpus=config.worker_cpus,
        num_gpus=config.worker_gpus or None,
        fn_constructor_args=arguments,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


class Embed:
    """Ray Data's view of `PhotoEmbedder`."""

    def __init__(self, config: EvaluationConfig, made: CorpusConfig) -> None:
        self.embed = PhotoEmbedder(config, made, BaseModel.from_pretrained(made.base).image_size)

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

    def __init__(self, config: EvaluationConfig, made: CorpusConfig, layout: dict[str, Any], galleries: Any) -> None:
        self.score = Scorer(config, made, LoRALayout.from_dict(layout), ray.get(galleries))

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
