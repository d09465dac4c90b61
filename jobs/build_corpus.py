#!/usr/bin/env python
"""Photos of people -> a corpus of LoRA vectors, on a laptop as on a cluster (Ray Data).

    ray job submit jobs/build_corpus.py                       # configs/tiny.yaml: renders 40 people, then makes theirs
    python jobs/build_corpus.py --config configs/tiny.yaml people=photos output=s3://bucket/corpus finetune.steps=60
    python jobs/build_corpus.py --config configs/sd15.yaml --dry-run

The same command goes on where a killed one stopped: nothing is done twice, nothing is lost. New people in the same place
are appended. Exit code 0: every person is in shards/ or in failures/. docs/reference/formats.md says what comes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

# `ray job submit` runs this file with jobs/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a test loads it

import pyarrow as pa
import ray
from causes import find_cause
from local_ray import connect
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_diffusion.config import load_config, to_dict, to_yaml
from lora_diffusion.corpus import CorpusReader, Manifest, finish_corpus
from lora_diffusion.factory import (
    AttemptsHere,
    BrokenDeviceError,
    CorpusConfig,
    DeviceError,
    LoRAMaker,
    PersonEmbedder,
    PersonRef,
    ShardMaker,
    embed_people,
    planning,
    report,
)
from lora_diffusion.factory.planning import Begun
from lora_diffusion.factory.tables import embedded_people, embedded_table, people_of, planned_table
from lora_diffusion.storage import StoreError, open_store, placed

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
CONTACT_SHEET, SUMMARY = "contact_sheet.png", "summary.txt"
USER_ERRORS = (ValueError, StoreError, DeviceError)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        config = load_config(CorpusConfig, args.config, args.overrides)
        return dry_run(config) if args.dry_run else run(config, args.ray_address)
    except (*USER_ERRORS, ray.exceptions.RayError) as error:
        cause = find_cause(error, USER_ERRORS, (ray.exceptions.RayError,))
        if cause is None:
            raise
        print(f"build_corpus: {cause}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print plan, configuration and cost; touch nothing")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example finetune.steps=60")
    return parser.parse_args(arguments)


def dry_run(config: CorpusConfig) -> int:
    """What `run` would do. Starts no Ray and writes nothing."""
    print(to_yaml(config))
    manifest, _ = describe(config)
    if planning.must_render(config):
        print(f"{config.people} is not there yet: {config.render_people} synthetic people would be rendered first")
        people = [f"person {i}" for i in range(config.render_people)][: config.limit]
    else:
        people = list(planning.list_people(config))
    begun = planning.preview(config, manifest, people)
    workers = planning.finetune_workers(config, {"CPU": os.cpu_count() or 1}, len(begun.todo))
    print(planning.describe(config, begun, workers))
    return 0


def run(config: CorpusConfig, ray_address: str) -> int:
    given, config = config, placed(config)  # workers have working directories of their own
    open_store(config.output, attempts=2).exists("corpus.json")  # a wrong address shows at once
    connect(ray_address)
    if planning.must_render(config):
        render_people(config)
    people = planning.list_people(config)
    manifest, picture_size = ray.get(small_task(config)(describe).remote(config))
    manifest = dataclasses.replace(manifest, config=to_dict(given), base={**manifest.base, "name": given.base})
    begun = planning.begin(config, manifest, people)
    todo = begun.todo
    workers = planning.finetune_workers(config, ray.cluster_resources(), len(todo))
    print(planning.describe(config, begun, workers), flush=True)
    progress = report.Progress(sum(len(shard.identities) for shard in todo))
    if todo:
        tables = [
            planned_table(
                shard, [planning.find(people, name) for name in shard.identities], begun.plan.people_per_shard
            )
            for shard in todo
        ]
        make(config, tables, picture_size, workers, progress)
    return finish(config, begun, people, progress)


def make(
    config: CorpusConfig, tables: list[pa.Table], picture_size: int, workers: int, progress: report.Progress
) -> None:
    """Read, embed, fine-tune, score and commit. One row of Ray Data is one person, one block one shard."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # waiting for a spot GPU is no error
    context.target_max_block_size = None  # never cut a shard in two
    context.raise_original_map_exception = True  # so that `find_cause` finds it
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    rows = config.people_per_group * config.groups_per_shard
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(AttemptsHere).options(num_cpus=0, scheduling_strategy=here).remote()
    need = config.workers
    # Retries are without limit (Ray's default): a lost node costs nobody, and the ledger ends what would never end.
    dataset = (
        ray.data.from_arrow(tables)
        .map_batches(
            Embed,
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=need.embed_min, max_size=need.embed_max),
            num_cpus=need.embed_cpus,
            fn_constructor_args=(config, picture_size, ledger),
        )
        .map_batches(
            Make,
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=min(need.finetune_min, workers), max_size=workers, initial_size=workers),
            num_cpus=need.finetune_cpus,
            num_gpus=need.finetune_gpus or None,
            fn_constructor_args=(config, ledger),
        )
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            line = progress.add(row["num_people"], row["num_failed"])
            if line:
                print(line, flush=True)


class LedgerOf:
    """`Attempts` that outlive the worker: they are counted by an actor on the driver's machine."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def begin(self, key: str) -> int:
        return int(ray.get(self.actor.begin.remote(key)))

    def end(self, key: str) -> None:
        ray.get(self.actor.end.remote(key))


class Embed:
    """Ray Data's view of `PersonEmbedder`."""

    def __init__(self, config: CorpusConfig, picture_size: int, ledger: Any) -> None:
        self.embed = PersonEmbedder(config, picture_size)
        self.attempts, self.max_deaths = LedgerOf(ledger), config.workers.max_deaths

    def __call__(self, planned: pa.Table) -> pa.Table:
        people = embed_people(self.embed, people_of(planned), self.attempts, self.max_deaths)
        return embedded_table(planned, people)


class Make:
    """Ray Data's view of `ShardMaker`. The rows stay in the shard; Ray carries only counts on."""

    def __init__(self, config: CorpusConfig, ledger: Any) -> None:
        self.people_per_group = config.people_per_group
        self.make = ShardMaker(config, LedgerOf(ledger))

    def __call__(self, embedded: pa.Table) -> pa.Table:
        try:
            done = self.make(*embedded_people(embedded, self.people_per_group))
        except BrokenDeviceError as error:
            print(f"{error}: this worker ends, another takes over", file=sys.stderr, flush=True)
            os._exit(1)
        return pa.Table.from_pylist([dataclasses.asdict(done)])


def finish(config: CorpusConfig, begun: Begun, people: dict[str, PersonRef], progress: report.Progress) -> int:
    """Check that nobody is missing, merge statistics, report. Returns the exit code."""
    store, shards = begun.store, begun.plan.shards
    infos, damaged = CorpusReader(store).verify(shards)
    if len(infos) < len(shards):
        good = {info.index for info in infos}
        missing = sum(len(shard.identities) for shard in shards if shard.index not in good)
        print(f"build_corpus: {missing} people are in no shard: run the same command again {damaged}", file=sys.stderr)
        return 1
    before = begun.manifest
    pending = bool(begun.todo) or before.state != "complete" or before.counts["num_shards"] != len(infos)
    if pending:
        finish_corpus(store, before, infos)
    text = report.summary(CorpusReader(store), progress.done, progress.seconds)
    print(text)
    if pending:
        store.write(SUMMARY, (text + "\n").encode())
        if any(info.num_people for info in infos):
            sheet = small_task(config, config.workers.finetune_gpus)(report.contact_sheet)
            store.write(CONTACT_SHEET, ray.get(sheet.remote(config, list(people.values()))))
            print(f"contact sheet: {store.uri}/{CONTACT_SHEET}")
    return 0


def small_task(config: CorpusConfig, gpus: float = 0) -> Any:
    """A Ray task in a process of its own, whose memory is gone with it."""
    return ray.remote(num_cpus=config.workers.embed_cpus, num_gpus=gpus, max_calls=1)


def describe(config: CorpusConfig) -> tuple[Manifest, int]:
    """Manifest and picture size. A task, because a driver may have neither the models nor the memory for them."""
    maker = LoRAMaker(dataclasses.replace(config, device="cpu"))
    return maker.manifest(), maker.base.image_size


def render_people(config: CorpusConfig) -> None:
    from lora_diffusion.world.people import SPLITS
    from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter

    folder, writer = FacesFolder(config.people, FacesConfig()), FacesWriter(config.people, FacesConfig())
    first = SPLITS["corpus"].start
    missing = folder.missing(range(first, first + config.render_people))
    print(f"rendering {len(missing)} synthetic people to {config.people}", flush=True)
    ray.get([ray.remote(draw).remote(writer, missing[i : i + 4]) for i in range(0, len(missing), 4)])
    folder.finish()


def draw(writer: Any, numbers: list[int]) -> None:
    writer({"numbers": numbers})


if __name__ == "__main__":
    sys.exit(main())
