"""Photos of people -> a corpus of LoRA vectors, on a laptop as on a cluster (Ray Data).

    ray job submit jobs/build_corpus.py                       # configs/tiny.yaml: 40 synthetic people
    lora-diffusion corpus people=photos output=s3://bucket/corpus finetune.steps=60
    lora-diffusion corpus configs/sd15.yaml people=s3://bucket/people output=s3://bucket/corpus --dry-run

people: a folder of folders, Parquet or tars; or synthetic:40, who are rendered into a folder beside the corpus.
The same command goes on where a killed one stopped: nothing is done twice, nothing is lost. New people in the same place
are appended. Exit code 0: every person is in shards/ or in failures/. docs/reference/formats.md says what comes out.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import time
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from lora_diffusion.config import relative, to_dict
from lora_diffusion.corpus import CorpusReader, Manifest, ShardPlan, finish_corpus
from lora_diffusion.corpus.forget import CONTACT_SHEET, SUMMARY
from lora_diffusion.corpus.plan import shard_name
from lora_diffusion.corpus.tombstone import read_key
from lora_diffusion.factory import planning, report
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.config import CorpusConfig, WorkerConfig
from lora_diffusion.factory.errors import BrokenDeviceError, DeviceError
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.factory.planning import CorpusRun
from lora_diffusion.jobs.board import with_the_driver
from lora_diffusion.jobs.causes import RunAgain, find_cause
from lora_diffusion.jobs.local_ray import Need, connect, rows_of
from lora_diffusion.jobs.observe import CorpusObserver, log
from lora_diffusion.jobs.synthetic import render_people
from lora_diffusion.models.files import NotHereError, here_only
from lora_diffusion.storage import open_store
from lora_diffusion.training.progress import Progress

Config = CorpusConfig
USER_ERRORS = (DeviceError,)
LESS_MEMORY = "a smaller people_per_group or score.max_batch"


def dry_run(config: CorpusConfig) -> str:
    config = planning.as_begun(config)
    count = planning.number_of_synthetic(config.people)
    people = planning.Listed({f"person {i}": PersonRef(f"person {i}") for i in range(count)[: config.limit]})
    people = people or planning.list_people(config)
    manifest, notes = None, []
    try:
        with here_only():
            manifest, _ = describe(config)
    except ValueError as error:
        if not (absent := find_cause(error, (NotHereError,))):
            raise
        notes.append(f"{absent}; whether it fits is not looked at")
    begun = planning.preview(config, manifest, people)
    if count:
        where = planning.people_folder(config.people, config.output)
        notes.append(f"{count} synthetic people, rendered to {where} unless they are there")
    return "\n".join([*notes, begun.describe(begun.workers({"CPU": os.cpu_count() or 1}))])


def run(config: CorpusConfig, ray_address: str) -> None:
    given = planning.as_begun(config)
    if given != config:
        print(f"{config.output} was begun before photos.same_person was a setting: it goes on without", flush=True)
    need, config = given.workers, given
    count = planning.number_of_synthetic(given.people)
    people = None if count else planning.list_people(config)  # before Ray: a place where nobody is takes no time
    connect(
        ray_address,
        [
            Need("embedding", "workers.embed_min and embed_cpus", need.embed_cpus, count=need.embed_min),
            Need("fine-tuning", "workers.finetune_cpus and finetune_gpus", need.finetune_cpus, need.finetune_gpus),
        ],
    )
    config = dataclasses.replace(config, people=planning.people_folder(config.people, config.output))
    if people is None:
        render_people(count, config.people)
        people = planning.list_people(config)
    manifest, picture_size = ray.get(small_task(config)(describe).remote(config))
    kept = relative(to_dict(given))
    names = {"base": kept["base"], "recogniser": kept["embedder"]["model"]}
    named = {key: {**getattr(manifest, key), "name": name} for key, name in names.items()}
    manifest = dataclasses.replace(manifest, config=kept, **named)
    begun = planning.begin(config, manifest, people)
    workers = begun.workers(ray.cluster_resources())
    print(begun.describe(workers), flush=True)
    progress = Progress(sum(len(shard.identities) for shard in begun.todo), "people")
    if begun.todo:
        make(begun, picture_size, workers, progress)
    finish(begun, progress)


def make(
    begun: CorpusRun,
    picture_size: int,
    workers: int,
    progress: Progress,
    stages: tuple[type[Any], type[Any]] | None = None,
) -> None:
    """Read, embed, fine-tune, score and commit. One row and one block of Ray Data is one shard.

    stages: in place of `Embed` and `Make` (benchmarks/simulated_cluster.py, where nothing is fine-tuned).
    """
    embed, tune = stages or (Embed, Make)
    config, need = begun.config, begun.config.workers
    ledger = ray.remote(InMemoryAttempts).options(num_cpus=0, scheduling_strategy=with_the_driver()).remote()
    # Retries are without limit (Ray's default): a lost node costs nobody, and the ledger ends what would never end.
    dataset = (
        ray.data.from_arrow([pack(work) for work in begun.work()])
        .map_batches(
            embed,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=need.embed_min, max_size=need.embed_max),
            num_cpus=need.embed_cpus,
            fn_constructor_args=(config, picture_size, ledger),
        )
        .map_batches(
            tune,
            batch_size=1,
            batch_format="pyarrow",
            compute=pool(need, workers, len(begun.todo)),
            num_cpus=need.finetune_cpus,
            num_gpus=need.finetune_gpus or None,
            fn_constructor_args=(config, ledger),
        )
    )
    told = set()
    for row in rows_of(dataset):
        if (note := row.get("note")) and note not in told:
            print(note, flush=True)
            told.add(note)
        progress.add(row["num_people"], row["num_failed"])


def pool(need: WorkerConfig, workers: int, shards: int) -> ActorPoolStrategy:
    """Of fine-tuning, `workers` at the start. A number of GPUs that somebody gave is asked for at once and for good: an autoscaler
    sees what is wanted, those that are there begin, and a lost one's place is filled. Else the pool grows with the cluster."""
    if need.finetune_max and need.finetune_gpus:
        return ActorPoolStrategy(size=workers)
    most = workers if need.finetune_max else shards
    return ActorPoolStrategy(min_size=min(need.finetune_min, workers), max_size=most, initial_size=workers)


class LedgerOf:
    """`Attempts` that outlive the worker: they are counted by an actor on the driver's machine."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def begin(self, key: str) -> int:
        return int(ray.get(self.actor.begin.remote(key)))

    def end(self, key: str) -> None:
        ray.get(self.actor.end.remote(key))


def pack(work: tuple[ShardPlan, list[Any]]) -> pa.Table:
    """A shard and its people as one row, pickled as Ray pickles all that goes between its processes."""
    return pa.table({"work": pa.array([pickle.dumps(work, protocol=5)], pa.large_binary())})


def unpack(table: pa.Table) -> tuple[ShardPlan, list[Any]]:
    """Inverse of `pack`."""
    return pickle.loads(table["work"][0].as_buffer())


class Embed:
    """Ray Data's view of `PersonEmbedder`."""

    def __init__(self, config: CorpusConfig, picture_size: int, ledger: Any) -> None:
        from lora_diffusion.factory.embed import PersonEmbedder

        self.embed = PersonEmbedder(config, picture_size)
        self.embed.check(CorpusReader(config.output).manifest)
        self.attempts, self.max_deaths = LedgerOf(ledger), config.workers.max_deaths
        self.observer = CorpusObserver(config.output)

    def __call__(self, table: pa.Table) -> pa.Table:
        from lora_diffusion.factory.isolate import embed_people

        start = time.perf_counter()
        shard, people = unpack(table)
        placed = list(zip(shard.positions, people, strict=True))
        embedded = embed_people(self.embed, placed, self.attempts, self.max_deaths)
        self.observer.stage("embed", time.perf_counter() - start)
        return pack((shard, embedded))


class Make:
    """Ray Data's view of `ShardMaker`. The rows stay in the shard; Ray carries only counts on."""

    def __init__(self, config: CorpusConfig, ledger: Any) -> None:
        from lora_diffusion.factory.shard import ShardMaker

        self.make = ShardMaker(config, LedgerOf(ledger))
        self.observer = CorpusObserver(config.output, read_key(self.make.writer.store))

    def __call__(self, table: pa.Table) -> pa.Table:
        start = time.perf_counter()
        try:
            done = self.make(*unpack(table))
        except BrokenDeviceError as error:
            log(event="worker_ends", run=self.make.config.output, error=f"{error}: another takes over")
            os._exit(1)
        self.observer.shard(shard_name(done.index), done.num_people, done.failed, time.perf_counter() - start)
        note = getattr(self.make.maker, "note", "")
        return pa.table({"num_people": [done.num_people], "num_failed": [len(done.failed)], "note": [note]})


def finish(begun: CorpusRun, progress: Progress, draw: bool = True) -> None:
    """Check that nobody is missing, merge statistics, report, `draw` a contact sheet. Raises RunAgain if somebody is in no shard."""
    config, store, shards = begun.config, begun.store, begun.plan.shards
    reader = CorpusReader(store)
    infos, damaged = reader.verify(shards)
    if len(infos) < len(shards):
        good = {info.index for info in infos}
        missing = sum(len(shard.identities) for shard in shards if shard.index not in good)
        raise RunAgain(f"{missing} people are in no shard: run the same command again {damaged or ''}")
    before = reader.manifest
    pending = bool(begun.todo) or before.state != "complete" or before.counts["num_shards"] != len(infos)
    pending = pending or not reader.has_whole_statistics() or not store.exists(SUMMARY)
    if pending:
        finish_corpus(store, before, infos)
    text = report.summary(CorpusReader(store), progress.done, progress.seconds)
    text = f"{begun.people.found}\n{text}" if begun.people.found else text
    print(text)
    if pending:
        store.write(SUMMARY, (text + "\n").encode())
        if draw and any(info.num_people for info in infos):
            sheet = small_task(config, config.workers.finetune_gpus)(draw_contact_sheet)
            store.write(CONTACT_SHEET, ray.get(sheet.remote(config, list(begun.people.values()))))
            print(f"contact sheet: {store.uri}/{CONTACT_SHEET}")


def small_task(config: CorpusConfig, gpus: float = 0) -> Any:
    """A Ray task in a process of its own, whose memory is gone with it."""
    return ray.remote(num_cpus=config.workers.embed_cpus, num_gpus=gpus, max_calls=1)


def draw_contact_sheet(config: CorpusConfig, people: list[PersonRef]) -> bytes:
    """A task for the same reason."""
    from lora_diffusion.factory.contact_sheet import contact_sheet

    return contact_sheet(config, people)


def describe(config: CorpusConfig) -> tuple[Manifest, int]:
    """Manifest and picture size. A task, because a driver may have neither the models nor the memory for them."""
    from lora_diffusion.factory.make import LoRAMaker

    maker = LoRAMaker(dataclasses.replace(config, device="cpu"))
    maker.try_out()
    return maker.manifest(Manifest.find(open_store(config.output))), maker.base.image_size
