"""A corpus of LoRA vectors -> a synthesiser: statistics, PCA, VAE, denoiser; then the pictures that it draws (Ray Train).

    ray job submit jobs/train.py                              # configs/train_tiny.yaml: the corpus of build_corpus.py
    ray job submit jobs/train.py -- stage=vae workers.num_workers=2
    lora-diffusion train pictures.start=tiny pictures.people=runs/tiny/photo_people    # no corpus: pictures alone teach
    lora-diffusion train configs/train_sd15.yaml corpus=s3://bucket/corpus output=s3://bucket/training
    lora-diffusion train --dry-run corpus=runs/tiny/corpus

The same command goes on where a killed one stopped, to the same losses. <output>/synthesizer is what
`Synthesizer.from_pretrained` takes; docs/guides/train.md says what else lies there.
"""

from __future__ import annotations

from typing import Any

import pyarrow.fs
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from lora_diffusion.artifacts.provenance import commit
from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.jobs.board import new_board, show_while
from lora_diffusion.jobs.local_ray import Need, connect
from lora_diffusion.jobs.observe import TrainingObserver
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.training.begin import begin, describe, snapshot_of
from lora_diffusion.synthesis.training.dataset import open_rows
from lora_diffusion.synthesis.training.pictures.recipe import PictureTraining
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.distributed import Group

Config = TrainConfig
LESS_MEMORY = "a smaller vae.hidden or batch_size, or workers.parallel=fsdp on several"


def dry_run(config: TrainConfig) -> str:
    return describe(config, snapshot_of(config))


def run(config: TrainConfig, ray_address: str) -> None:
    print(describe(config, snapshot_of(config)), flush=True)  # refuses what does not fit
    need = config.workers
    keys = "workers.num_workers, cpus and use_gpu"
    connect(ray_address, [Need("training", keys, need.cpus, float(need.use_gpu), need.num_workers)])
    snapshot = begin(config)
    board = new_board()
    between: Any = (need.num_workers, need.max_workers) if need.max_workers else need.num_workers
    settings: dict[str, Any] = {"worker_runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(need.cpus)}}}
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "config": to_dict(config),
            "snapshot": None if snapshot is None else snapshot.to_dict(),
            "board": board,
            "commit": commit(),
        },
        scaling_config=ScalingConfig(
            num_workers=between,
            use_gpu=need.use_gpu,
            resources_per_worker={"CPU": need.cpus, **({"GPU": 1} if need.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray",
            failure_config=FailureConfig(max_failures=need.max_failures),
            **settings,
            **storage(open_store(config.output)),
        ),
    )
    show_while(trainer.fit, board)


def storage(store: Store) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: in the run's folder, through the same client as everything else."""
    if store.local:
        return {"storage_path": store.root}
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.filesystem))
    return {"storage_path": store.root, "storage_filesystem": filesystem}


def worker(values: dict[str, Any]) -> None:
    """One of the training processes: the library's training in Ray Train's process group.

    User errors recur on every worker and at every try: they are reported, not raised.
    """
    import torch

    config = from_dict(TrainConfig, values["config"])
    torch.set_num_threads(config.workers.cpus)
    place, board = ray.train.get_context(), values["board"]
    group = Group.current(place.get_local_rank(), ray.train.torch.get_device())

    def say(line: str) -> None:
        board.say.remote(line)

    observer = TrainingObserver(config.output) if group.rank == 0 else None

    def report(values: dict[str, Any]) -> None:
        """To Ray's controller ends of stages only: it takes a report every two seconds, and a worker waits for it."""
        if observer is not None:
            observer.report(values)
        if values["done"]:
            ray.train.report(values)

    gone: set[str] = set()

    def leaving() -> bool:
        """Whether Ray says of a machine of this run, for the first time, that it is drained, as before a preemption."""
        info = ray.train.get_preemption_info()  # all workers get the same answer
        new = set(info.preempted_node_ids) - gone if info else set()
        gone.update(new)
        if new and group.rank == 0:
            say("a machine of this run is being taken away: the state is saved")
        return bool(new)

    told: dict[str, Any] = {"say": say, "report": report, "commit": values["commit"], "leaving": leaving}
    store = open_store(config.output)
    try:
        if values["snapshot"] is not None:
            snapshot = CorpusSnapshot.from_dict(values["snapshot"])
            rows = open_rows(snapshot, config.data, group)
            if group.rank == 0:
                left = ", ".join(f"{count} × {name}" for name, count in rows.left_out.items()) or "none"
                say(
                    f"rows: {len(rows.train):,} for training, {len(rows.validation):,} for validation, left out: {left}"
                )
            SynthesizerTraining(config, snapshot, rows, store, group, **told).run()
        if "pictures" in config.stages:
            PictureTraining(config, store, group, **told).run()
    except ValueError as error:
        board.fail.remote(str(error))
