#!/usr/bin/env python
"""Train the embedded base model, tiny-sd, on rendered faces: autoencoder, then UNet and text encoder (Ray Train).

    ray job submit jobs/world/train_base.py            # or: python jobs/world/train_base.py recipe.denoiser.steps=200 recipe.work=runs/quick
    python jobs/world/train_base.py --config my_base.yaml num_workers=2

Needs faces of the base split: jobs/world/make_faces.py --people 0:2700 --views 10 --out runs/base_faces
The same command goes on where a killed run stopped. Nothing is trained twice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.jobs.run import Job, run_job
from lora_diffusion.world.base.recipe import TrainBaseConfig, load_faces, train_base

Config = TrainBaseConfig


def dry_run(config: TrainBaseConfig) -> str:
    stages = {name: getattr(config.recipe, name) for name in ("autoencoder", "denoiser")}
    return "\n".join(f"{name}: {stage.steps:,} steps of {stage.batch_size} photos" for name, stage in stages.items())


def run(config: TrainBaseConfig, ray_address: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from lora_diffusion.jobs.local_ray import Need, connect

    keys = "num_workers, cpus_per_worker and use_gpu"
    connect(ray_address, [Need("training", keys, config.cpus_per_worker, config.use_gpu, config.num_workers)])
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": to_dict(config)},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=config.name, storage_path=config.storage, failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()
    print(f"wrote {config.recipe.out}")


def worker(values: dict[str, Any]) -> None:
    """One data-parallel worker: the library's training with Ray's process group, device and reports."""
    import ray.train
    import ray.train.torch
    import torch

    from lora_diffusion.training.distributed import Group

    config = from_dict(TrainBaseConfig, values["config"])
    recipe = config.recipe
    torch.set_num_threads(max(1, config.cpus_per_worker))
    group = Group.current(ray.train.get_context().get_local_rank(), ray.train.torch.get_device())
    started, lines = time.monotonic(), Path(recipe.work) / "progress.jsonl"

    def report(values: dict[str, Any]) -> None:
        line = {**values, "seconds": round(time.monotonic() - started, 1)}
        if group.rank == 0:
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if values["checkpoint"]:
            ray.train.report(line)

    train_base(recipe, load_faces(recipe.faces, recipe.model.image_size), group, report)


if __name__ == "__main__":
    sys.exit(run_job(Job("train_base", "__main__")))
