"""The published corpus of weights2weights (arXiv:2406.09413) -> a corpus of ours, in float16 (Ray Data).

    jobs/import_weights2weights.py all_weights.pt photos=celeba_generated identities=identity_df.csv output=corpus
    lora-diffusion import-weights2weights all_weights.pt embeddings=arcface.npy recogniser=buffalo_l output=corpus
    lora-diffusion import-weights2weights proj_1000pc.pt pca=files embeddings=arcface.npy output=corpus limit=1000 --dry-run

all_weights.pt: one tensor (people, 99,648). It is mapped into memory and copied row by row; nothing is unpickled.
The same command goes on where a killed one stopped. docs/guides/weights2weights.md: what to train with it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from lora_diffusion.corpus.plan import shard_name
from lora_diffusion.corpus.tombstone import read_key
from lora_diffusion.factory import planning
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.planning import CorpusRun
from lora_diffusion.factory.weights2weights import ImportConfig, ShardImporter, Source
from lora_diffusion.jobs.board import with_the_driver
from lora_diffusion.jobs.corpus import Embed, finish, pack, unpack
from lora_diffusion.jobs.local_ray import Need, connect, rows_of
from lora_diffusion.jobs.observe import CorpusObserver
from lora_diffusion.storage import open_store
from lora_diffusion.training.meter import in_bytes
from lora_diffusion.training.progress import Progress

Config = ImportConfig
PICTURE_SIZE = 64  # px of the pictures that come with an embedding; nobody looks at them


def dry_run(config: ImportConfig) -> str:
    source = Source(config)
    begun = planning.preview(config.corpus, source.manifest(), source.people())
    return told(begun, source)


def run(config: ImportConfig, ray_address: str) -> None:
    source = Source(config)
    begun = planning.begin(config.corpus, source.manifest(), source.people())
    print(told(begun, source), flush=True)
    progress = Progress(sum(len(shard.identities) for shard in begun.todo), "people")
    if begun.todo:
        workers = min(config.workers or min(8, os.cpu_count() or 1), len(begun.todo))
        stages = 2 if config.photos else 1
        connect(ray_address, [Need("copying", "workers and cpus", config.cpus, count=workers * stages)])
        copy(begun, config, workers, progress)
    finish(begun, progress, draw=False)


def told(begun: CorpusRun, source: Source) -> str:
    left = sum(len(shard.identities) for shard in begun.todo)
    size = left * source.layout.size * 2
    return (
        f"{len(source.row_of):,} of {source.count:,} rows of {source.config.weights}, layout {source.layout.layout_id}; {left:,} of "
        f"them to be copied, {in_bytes(size)} -> {begun.config.output}"
    )


def copy(begun: CorpusRun, config: ImportConfig, workers: int, progress: Progress) -> None:
    """One row and one block of Ray Data is one shard."""
    dataset: ray.data.Dataset = ray.data.from_arrow([pack(work) for work in begun.work()])
    pools: list[tuple[Any, tuple[Any, ...]]] = [(Import, (config,))]
    if config.photos is not None:
        ledger = ray.remote(InMemoryAttempts).options(num_cpus=0, scheduling_strategy=with_the_driver()).remote()
        pools.insert(0, (Embed, (begun.config, PICTURE_SIZE, ledger)))
    for work, arguments in pools:
        dataset = dataset.map_batches(
            work,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers),
            num_cpus=config.cpus,
            fn_constructor_args=arguments,
        )
    for row in rows_of(dataset):
        progress.add(row["num_people"], row["num_failed"])


class Import:
    """Ray Data's view of `ShardImporter`."""

    def __init__(self, config: ImportConfig) -> None:
        self.copy = ShardImporter(config)
        self.observer = CorpusObserver(config.output, read_key(open_store(config.output)))

    def __call__(self, table: pa.Table) -> pa.Table:
        start = time.perf_counter()
        done = self.copy(*unpack(table))
        self.observer.shard(shard_name(done.index), done.num_people, done.failed, time.perf_counter() - start)
        return pa.table({"num_people": [done.num_people], "num_failed": [len(done.failed)]})
