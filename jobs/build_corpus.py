#!/usr/bin/env python
"""Photos of people -> a corpus of LoRA vectors, on a laptop as on a cluster (Ray Data).

    ray job submit jobs/build_corpus.py                       # configs/tiny.yaml: renders 40 people, then makes theirs
    python jobs/build_corpus.py --config configs/tiny.yaml people=photos output=s3://bucket/corpus finetune.steps=60
    python jobs/build_corpus.py --config configs/sd15.yaml --dry-run

The same command goes on where a killed one stopped: nothing is done twice, nothing is lost. New people in the same place
are appended. Exit code 0: every person is in shards/ or in failures/. docs/FORMAT.md says what comes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # `ray job submit` runs this file with jobs/ on the path, not the repository

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_diffusion.config import load_config, to_yaml
from lora_diffusion.corpus import (
    CorpusReader,
    Manifest,
    Plan,
    ShardPlan,
    extend_plan,
    finish_corpus,
    open_corpus,
)
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
    open_people,
    report,
)
from lora_diffusion.factory.tables import embedded_people, embedded_table, people_of, planned_table
from lora_diffusion.storage import Store, StoreError, open_store

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
CONTACT_SHEET, SUMMARY = "contact_sheet.png", "summary.txt"
USER_ERRORS = (ValueError, StoreError, DeviceError)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        config = load_config(CorpusConfig, args.config, args.overrides)
        return dry_run(config) if args.dry_run else run(config, args.ray_address)
    except USER_ERRORS as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    except ray.exceptions.RayError as error:
        cause = user_error(error)
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
    manifest = LoRAMaker(config).manifest()
    if must_render(config):
        print(f"{config.people} is not there yet: {config.render_people} synthetic people would be rendered first")
        people = [PersonRef(f"person {i}") for i in range(config.render_people)][: config.limit]
    else:
        people = list_people(config)
    store = open_store(config.output)
    there = CorpusReader(store) if store.exists("corpus.json") else None
    plan, infos = Plan((), config.people_per_group, config.groups_per_shard), []
    if there is not None:
        open_corpus(store, manifest)  # raises if the corpus there is of another recipe
        plan, (infos, _) = there.plan, there.verify()
    part = plan.new_part([person.identity for person in people])
    plan = dataclasses.replace(plan, parts=(*plan.parts, part)) if part else plan
    print_plan(config, manifest, plan, len(infos))
    measured = report.measured_seconds(there) if there is not None and infos else None
    done = sum(len(plan.shards[info.index].identities) for info in infos)
    workers = finetune_workers(config, {"CPU": os.cpu_count() or 1, "GPU": 0}, len(plan.shards))
    print("cost:", report.estimate(config, len(plan.identities) - done, manifest.vector_size, workers, measured))
    return 0


def run(config: CorpusConfig, ray_address: str) -> int:
    store = open_store(config.output, attempts=2)  # a wrong address or a read-only place shows at once
    store.exists("corpus.json")
    if not ray.is_initialized():
        ray.init(
            address=ray_address, logging_level="ERROR", runtime_env={"env_vars": {"OMP_NUM_THREADS": omp_threads()}}
        )
    if must_render(config):
        render_people(config)
    people = {person.identity: person for person in list_people(config)}
    wanted, picture_size = ray.get(ray.remote(num_cpus=config.workers.embed_cpus, max_calls=1)(describe).remote(config))
    manifest = open_corpus(store, wanted)
    store = open_store(config.output)
    for folder in ("", "shards", "failures", "statistics", "plan"):
        store.sweep(folder)

    reader = CorpusReader(store)
    plan = extend_plan(store, reader.plan, people)
    infos, damaged = reader.verify(plan.shards)
    for index, problem in damaged.items():
        print(f"shard {index} {problem}: it will be made again")
    print_plan(config, manifest, plan, len(infos))
    todo = [shard for shard in plan.shards if shard.index not in {info.index for info in infos}]
    progress = report.Progress(sum(len(shard.identities) for shard in todo))
    if todo:
        workers = finetune_workers(config, ray.cluster_resources(), len(todo))
        measured = report.measured_seconds(reader) if infos else None
        print(report.estimate(config, progress.total, manifest.vector_size, workers, measured), flush=True)
        make(config, todo, people, picture_size, workers, progress)
    return finish(config, store, manifest, plan, people, progress, fresh=bool(todo))


def make(
    config: CorpusConfig,
    shards: Sequence[ShardPlan],
    people: dict[str, PersonRef],
    picture_size: int,
    workers: int,
    progress: report.Progress,
) -> None:
    """Read, embed, fine-tune, score and commit `shards`. One block of Ray Data is one shard, one row one person."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # waiting for a spot GPU is no error
    context.target_max_block_size = None  # never cut a shard in two
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    rows = config.people_per_group * config.groups_per_shard
    tables = [planned_table(shard, [find(people, identity) for identity in shard.identities], rows) for shard in shards]
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


def finish(
    config: CorpusConfig,
    store: Store,
    manifest: Manifest,
    plan: Plan,
    people: dict[str, PersonRef],
    progress: report.Progress,
    fresh: bool,
) -> int:
    """Check that nobody is missing, merge statistics, report. Returns the exit code."""
    reader = CorpusReader(store)
    infos, damaged = reader.verify(plan.shards)
    missing = [shard for shard in plan.shards if shard.index not in {info.index for info in infos}]
    if missing:
        count = sum(len(shard.identities) for shard in missing)
        print(f"build_corpus: {count} people are in no shard: run the same command again. {damaged}", file=sys.stderr)
        return 1
    if fresh or manifest.state != "complete" or manifest.counts["num_shards"] != len(infos):
        finish_corpus(store, manifest, infos)
    text = report.summary(CorpusReader(store), progress.done, progress.seconds)
    print(text)
    if not fresh:
        return 0
    store.write(SUMMARY, (text + "\n").encode())
    if any(info.num_people for info in infos):
        shown = ray.remote(num_cpus=config.workers.embed_cpus, num_gpus=config.workers.finetune_gpus, max_calls=1)
        store.write(CONTACT_SHEET, ray.get(shown(report.contact_sheet).remote(config, list(people.values()))))
        print(f"contact sheet: {store.uri}/{CONTACT_SHEET}")
    return 0


def describe(config: CorpusConfig) -> tuple[Manifest, int]:
    """Manifest and picture size. A task, because a driver may have neither the models nor the memory for them."""
    maker = LoRAMaker(dataclasses.replace(config, device="cpu"))
    return maker.manifest(), maker.base.image_size


def list_people(config: CorpusConfig) -> list[PersonRef]:
    """Everyone in the source, sorted, up to `config.limit`. Raises ValueError if there is nobody."""
    people = sorted(open_people(config.people).list_people(), key=lambda person: person.identity)
    if not people:
        raise ValueError(f"nobody in {config.people}: expected {config.people}/<identity>/*.jpg")
    return people[: config.limit]


def find(people: dict[str, PersonRef], identity: str) -> PersonRef:
    gone = PersonRef(identity, problem=("photos_gone", "planned by an earlier run, but no longer in the source"))
    return people.get(identity, gone)


def must_render(config: CorpusConfig) -> bool:
    """Whether `people` is to be rendered first: asked for, and not there, or its rendering was interrupted."""
    if not config.render_people:
        return False
    store = open_store(config.people)
    return not store.exists("faces.parquet") and (store.exists("faces.json") or not (store.folders() or store.files()))


def render_people(config: CorpusConfig) -> None:
    from lora_diffusion.faces.synthetic import SPLITS
    from lora_diffusion.faces.synthetic.dataset import FacesConfig, FacesFolder, FacesWriter

    folder, writer = FacesFolder(config.people, FacesConfig()), FacesWriter(config.people, FacesConfig())
    first = SPLITS["corpus"].start
    tasks = folder.plan(range(first, first + config.render_people), people_per_task=4)
    print(f"rendering {sum(map(len, tasks))} synthetic people to {config.people}", flush=True)
    ray.get([ray.remote(draw).remote(writer, numbers) for numbers in tasks])
    folder.finish()


def draw(writer: Any, numbers: list[int]) -> None:
    writer({"numbers": numbers})


def finetune_workers(config: CorpusConfig, resources: dict[str, float], shards: int) -> int:
    """Size of the pool: what was asked for, or what the cluster holds now; never more than there are shards."""
    need = config.workers
    count = need.finetune_max
    if not count and need.finetune_gpus:
        count = math.floor(resources.get("GPU", 0) / need.finetune_gpus + 1e-6)
    elif not count:
        free = resources.get("CPU", 1) - need.embed_min * need.embed_cpus
        count = math.floor(free / need.finetune_cpus + 1e-6)
    return max(1, min(count, shards))


def print_plan(config: CorpusConfig, manifest: Manifest, plan: Plan, done: int) -> None:
    print(
        f"{len(plan.identities)} people of {config.people} in {len(plan.shards)} shards of {plan.people_per_shard}, "
        f"{done} of them done -> {config.output}\n"
        f"base model {manifest.base['name']} ({manifest.base['fingerprint']}), layout {manifest.layout_id}: "
        f"{manifest.vector_size:,} floats a LoRA, {config.people_per_group} people fine-tuned together",
        flush=True,
    )


def omp_threads() -> str:
    """One thread for each worker, unless the user says otherwise: two workers on two cores must not be four threads."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def user_error(error: BaseException) -> BaseException | None:
    """The error of ours inside Ray's wrapping, if there is one."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        item = queue.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, USER_ERRORS) and not isinstance(item, ray.exceptions.RayError):
            return item
        queue += [getattr(item, "cause", None), item.__cause__, item.__context__]
    return None


if __name__ == "__main__":
    sys.exit(main())
