#!/usr/bin/env python
"""The corpus job on many machines that come and go, simulated on this one: dozens of Ray nodes, fine-tuning is a sleep.

    python benchmarks/simulated_cluster.py                   # 12 nodes, 4,000 people: writes results/simulated_cluster.json
    python benchmarks/simulated_cluster.py --nodes 32 --people 65000 --lose-every 30      # 25 GB of disk

Everything else is the job's own: plan, Ray Data, ledger of attempts, shards with rows of 99,648 numbers, verify, statistics.
Every `--lose-every` seconds a node is killed and another one joins. Then, without Ray, what a driver does with very many
people: `--plan` times planning and its memory for so many names.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

from lora_diffusion.config import load_config
from lora_diffusion.corpus import CorpusReader, Failure, Manifest, Person
from lora_diffusion.factory import planning
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.factory.planning import Listed
from lora_diffusion.storage import open_store
from lora_diffusion.training.progress import Progress

SLEEP = 0.2  # seconds of "fine-tuning" a group
BASE = {"name": "none", "fingerprint": "0" * 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--people", type=int, default=4_000)
    parser.add_argument("--lose-every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--plan", type=int, nargs="*", default=[65_000, 1_000_000])
    parser.add_argument("--only-plan", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_plan:
        print(plan_alone(args.only_plan))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        result: dict[str, Any] = {"nodes": args.nodes, "vector_size": 99_648, "run": simulate(args, f"{folder}/corpus")}
    print(result, flush=True)
    result["planning"] = []
    for count in args.plan:
        command = [sys.executable, __file__, "--only-plan", str(count)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result["planning"].append(
            {"people": count, **dict(zip(("seconds", "driver_mb"), map(float, said.split()), strict=True))}
        )
    from common import write_result

    print("written:", write_result("simulated_cluster", result))


def settings(output: str) -> CorpusConfig:
    config = load_config(CorpusConfig, "configs/sd15.yaml", [f"output={output}", "people=/nowhere"])
    workers = replace(
        config.workers, embed_min=1, embed_max=2, embed_cpus=0.5, finetune_min=1, finetune_max=0, finetune_gpus=0
    )
    return replace(config, workers=replace(workers, finetune_cpus=1))


def manifest(config: CorpusConfig) -> Manifest:
    from lora_diffusion.factory.weights2weights import layout

    return Manifest(layout().to_dict(), BASE, config.recipe("none"))


def listed(count: int) -> Listed:
    return Listed({f"person-{i:08d}": PersonRef(f"person-{i:08d}", f"folder-{i:08d}") for i in range(count)})


class SleepMaker:
    """A row for everybody, after a while."""

    def __init__(self, there: Manifest) -> None:
        self.there = there

    def manifest(self, there: Manifest | None = None) -> Manifest:
        return self.there

    def __call__(self, people: Sequence[EmbeddedPerson]) -> list[Person | Failure]:
        time.sleep(SLEEP)
        nan, rows = float("nan"), []
        for person in people:
            assert person.embedding is not None
            assert person.photo_embeddings is not None
            vector_N = np.random.default_rng(person.position).standard_normal(self.there.vector_size, np.float32) / 100
            measured = {
                "similarity": nan,
                "base_similarity": nan,
                "photo_similarity": nan,
                "loss": nan,
                "embed_seconds": 0.0,
            }
            counts = {"steps": 0, "seed": 0, "num_photos": 1, "num_photos_dropped": 0}
            rows.append(
                Person(
                    person.position,
                    person.identity,
                    vector_N,
                    person.embedding,
                    person.photo_embeddings,
                    photo_sha256=("",),
                    finetune_seconds=SLEEP,
                    score_seconds=0.0,
                    **measured,
                    **counts,  # type: ignore[arg-type]
                )
            )
        return list(rows)


class SleepEmbed:
    def __init__(self, config: CorpusConfig, picture_size: int, ledger: Any) -> None:
        self.embedding = np.full(512, 512**-0.5, np.float32)

    def __call__(self, table: Any) -> Any:
        from lora_diffusion.jobs.corpus import pack, unpack

        shard, people = unpack(table)
        one = {"embedding": self.embedding, "photo_embeddings": self.embedding[None]}
        placed = zip(shard.positions, people, strict=True)
        return pack((shard, [EmbeddedPerson(position, person.identity, **one) for position, person in placed]))


class SleepMake:
    def __init__(self, config: CorpusConfig, ledger: Any) -> None:
        from lora_diffusion.factory.shard import ShardMaker
        from lora_diffusion.jobs.corpus import LedgerOf

        self.make = ShardMaker(config, LedgerOf(ledger), SleepMaker(CorpusReader(config.output).manifest))

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        from lora_diffusion.jobs.corpus import unpack

        done = self.make(*unpack(table))
        counts = {"num_people": [done.num_people], "num_failed": [len(done.failed)]}
        return pa.table({"index": [done.index], **counts})


def simulate(args: argparse.Namespace, output: str) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    from lora_diffusion.jobs import corpus
    from lora_diffusion.jobs.local_ray import connect

    folder = tempfile.mkdtemp(prefix="ray")
    cluster, memory = Cluster(), {"object_store_memory": 100_000_000}
    in_time(lambda: cluster.add_node(num_cpus=2, temp_dir=folder, include_dashboard=False, **memory))
    nodes = [in_time(lambda: cluster.add_node(num_cpus=1, **memory)) for _ in range(args.nodes)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    connect("auto")
    lost = 0
    config, people = settings(output), listed(args.people)
    found: dict[str, Any] = {"people": args.people}
    found["begin_seconds"], begun = timed(lambda: planning.begin(config, manifest(config), people))
    progress = Progress(args.people, "people")
    stages = (SleepEmbed, SleepMake)
    with ThreadPoolExecutor(1) as pool:  # nodes can be added by the main thread alone
        job = pool.submit(timed, lambda: corpus.make(begun, 512, args.nodes, progress, stages))
        while wait([job], args.lose_every).not_done:
            cluster.remove_node(nodes.pop(random.Random(lost).randrange(len(nodes))), allow_graceful=False)
            lost += 1
            nodes.append(in_time(lambda: cluster.add_node(num_cpus=1, **memory)))
        found["make_seconds"], _ = job.result()
    found["driver_peak_mb"] = peak_mb()
    found["nodes_lost"] = lost
    found["shards"] = len(begun.plan.shards)
    found["finish_seconds"], _ = timed(lambda: corpus.finish(begun, progress, draw=False))
    found["driver_peak_mb_at_the_end"] = peak_mb()
    found["commits_per_second"] = round(found["shards"] / found["make_seconds"], 2)
    found["resume_seconds"], again = timed(lambda: planning.begin(config, manifest(config), people))
    assert not again.todo
    store = open_store(output)
    for name in ("shards", "statistics"):
        found[f"{name}_megabytes"] = round(sum(store.files(name).values()) / 1e6)
    assert len(CorpusReader(output)) == args.people
    ray.shutdown()
    cluster.shutdown()
    return found


def plan_alone(count: int) -> str:
    """Seconds and peak memory of a driver that plans `count` new people and packs their work, without making anything."""
    from lora_diffusion.jobs.corpus import pack

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        config = settings(f"{folder}/corpus")
        wanted = manifest(config)
        seconds, _ = timed(lambda: [pack(w) for w in planning.begin(config, wanted, listed(count)).work()])
    return f"{seconds} {peak_mb()}"


def in_time(start: Any) -> Any:
    """A node has 30 s to start, which a busy machine may need for other things: three times."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    done = work()
    return round(time.perf_counter() - start, 2), done


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


if __name__ == "__main__":
    main()
