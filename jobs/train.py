#!/usr/bin/env python
"""A corpus of LoRA vectors -> a synthesiser: statistics, PCA, VAE, denoiser (Ray Train).

    ray job submit jobs/train.py                              # configs/train_tiny.yaml: the corpus of build_corpus.py
    ray job submit jobs/train.py -- stage=vae workers.num_workers=2
    python jobs/train.py configs/train_sd15.yaml corpus=s3://bucket/corpus output=s3://bucket/training
    python jobs/train.py --dry-run corpus=runs/tiny/corpus

The same command goes on where a killed one stopped, to the same losses. <output>/synthesizer is what
`Synthesizer.from_pretrained` takes; docs/guides/train.md says what else lies there.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# `ray job submit` runs this file with jobs/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a test loads it

import pyarrow as pa
import pyarrow.fs
import ray
import ray.train
from causes import find_cause
from local_ray import connect
from ray.data import DataContext
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from lora_diffusion.config import from_dict, load_config, to_dict, to_yaml
from lora_diffusion.provenance import commit
from lora_diffusion.storage import Store, StoreError, open_store, placed
from lora_diffusion.synthesis.training.begin import begin, describe, snapshot_of
from lora_diffusion.synthesis.training.dataset import RowCache, read_rows
from lora_diffusion.synthesis.training.distributed import Group
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot
from lora_diffusion.synthesis.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = ROOT / "configs" / "train_tiny.yaml"
USER_ERRORS = (ValueError, StoreError)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        config = placed(load_config(TrainConfig, args.config, args.overrides))
        if args.dry_run:
            print(to_yaml(config))
            print(describe(config, snapshot_of(config)))
            return 0
        return run(config, args.ray_address)
    except (*USER_ERRORS, ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        cause = find_cause(error, USER_ERRORS, (ray.exceptions.RayError,))
        if cause is None:
            raise
        print(f"train: {cause}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=None, help=f"YAML file (default: configs/{DEFAULT_CONFIG.name})")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, rows, sizes, cost; touch nothing")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    parser.add_argument("overrides", nargs="*", metavar="[FILE.yaml] key=value", help="for example stage=vae")
    args = parser.parse_args(arguments)
    if args.overrides and "=" not in args.overrides[0] and args.config is None:
        args.config = Path(args.overrides.pop(0))
    args.config = args.config or DEFAULT_CONFIG
    return args


def run(config: TrainConfig, ray_address: str) -> int:
    snapshot = begin(config)
    print(describe(config, snapshot), flush=True)
    start_ray(config, ray_address)
    board = ray.remote(Board).options(num_cpus=0).remote()
    need = config.workers
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "config": to_dict(config),
            "snapshot": snapshot.to_dict(),
            "board": board,
            "commit": commit(),
        },
        scaling_config=ScalingConfig(
            num_workers=(need.num_workers, need.max_workers) if need.max_workers else need.num_workers,
            use_gpu=need.use_gpu,
            resources_per_worker={"CPU": need.cpus, **({"GPU": 1} if need.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray",
            failure_config=FailureConfig(max_failures=need.max_failures),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(need.cpus)}},
            **storage(open_store(config.output)),
        ),
        # Nobody's share: each machine fills its own cache with all rows, if it has none yet.
        datasets={"corpus": rows_of(snapshot)},
        dataset_config=DataConfig(datasets_to_split=[]),
    )
    with shown(board):
        trainer.fit()
    problem = ray.get(board.problem.remote())
    if problem:
        raise ValueError(problem)
    return 0


def start_ray(config: TrainConfig, address: str) -> None:
    """A cluster with fewer CPUs than training and reading ask for is waited for: says so."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    need = config.workers
    wanted = (need.max_workers or need.num_workers) * need.cpus + 1
    connect(address, wanted)
    there = ray.cluster_resources().get("CPU", 0)
    least = need.num_workers * need.cpus + 1
    if there < least:
        print(
            f"train: {least} CPUs are needed (one of them to read), {there:.0f} are there: waiting for more", flush=True
        )


def storage(store: Store) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: in the run's folder, through the same client as everything else."""
    if store.local:
        return {"storage_path": store.root}
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.filesystem))
    return {"storage_path": store.root, "storage_filesystem": filesystem}


def rows_of(snapshot: CorpusSnapshot) -> ray.data.Dataset:
    """All rows of the corpus, a block for each row group, read when a worker asks for them."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1
    context.raise_original_map_exception = True
    shards = [{"shard": index} for index in snapshot.shards]

    def read(shards: pa.Table) -> Iterator[pa.Table]:
        for index in shards["shard"].to_pylist():
            yield from read_rows(snapshot, index)

    return ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(read, batch_format="pyarrow")


class Board:
    """What the workers say, kept until the driver shows it. An actor."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error = ""

    def say(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def fail(self, message: str) -> None:
        self.error = self.error or message

    def problem(self) -> str:
        return self.error


@contextmanager
def shown(board: Any) -> Iterator[None]:
    """Print what is said on the board while the block runs, and what is left at its end."""
    over = threading.Event()

    def show() -> None:
        for line in ray.get(board.take.remote()):
            print(line, flush=True)

    def watch() -> None:
        while not over.wait(1.0):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        show()


def worker(values: dict[str, Any]) -> None:
    """One of the training processes: the library's training in Ray Train's process group.

    Mistakes of the user are alike on all workers and no other try would heal them: they are told, not raised.
    """
    import torch

    config, snapshot = from_dict(TrainConfig, values["config"]), CorpusSnapshot.from_dict(values["snapshot"])
    torch.set_num_threads(config.workers.cpus)
    place, board = ray.train.get_context(), values["board"]
    group = Group.current(place.get_local_rank(), ray.train.torch.get_device())

    def say(line: str) -> None:
        board.say.remote(line)

    def report(values: dict[str, Any]) -> None:
        """Ends of stages only: Ray's controller takes a report every two seconds, and a worker waits for it."""
        if values["done"]:
            ray.train.report(values)

    try:
        cache = RowCache(snapshot, config.data.cache)
        fill(cache, group)
        rows = cache.open(config.data)
        if group.rank == 0:
            left = ", ".join(f"{count} × {name}" for name, count in rows.left_out.items()) or "none"
            say(f"rows: {len(rows.train):,} for training, {len(rows.validation):,} for validation, left out: {left}")
        training = SynthesizerTraining(
            config,
            snapshot,
            rows,
            open_store(config.output),
            group,
            say=say,
            report=report,
            commit=values["commit"],
        )
        training.run()
    except ValueError as error:
        board.fail.remote(str(error))


def fill(cache: RowCache, group: Group) -> None:
    """The first worker of each machine copies the corpus to its disk, as Ray Data streams it in."""
    error: Exception | None = None
    if group.local_rank == 0 and not cache.complete:
        try:
            cache.begin()
            dataset = ray.train.get_dataset_shard("corpus")
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                cache.put(table)
            cache.finish()
        except Exception as caught:
            error = find_cause(caught, USER_ERRORS, (ray.exceptions.RayError,)) or caught  # type: ignore[assignment]
    group.agree(error)


if __name__ == "__main__":
    sys.exit(main())
