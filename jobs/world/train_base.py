#!/usr/bin/env python
"""Train the embedded base model, tiny-sd, on rendered faces: autoencoder, then UNet and text encoder (Ray Train).

    ray job submit jobs/world/train_base.py            # or: python jobs/world/train_base.py denoiser.steps=200 work=runs/quick
    python jobs/world/train_base.py --config my_base.yaml num_workers=2

Needs faces of the base split: jobs/world/make_faces.py --people 0:2700 --views 10 --out runs/base_faces
The same command goes on where a killed run stopped. Nothing is trained twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.config import from_dict, load_config, placed, to_dict
from lora_diffusion.world.base.recipe import TrainBaseConfig, load_faces, train_base


def worker(values: dict[str, Any]) -> None:
    """One data-parallel worker: the library's training with Ray's process group, device and reports."""
    import ray.train
    import ray.train.torch
    import torch

    config = from_dict(TrainBaseConfig, values["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, config.cpus_per_worker))
    recipe = config.recipe
    started, lines = time.monotonic(), Path(recipe.work) / "progress.jsonl"

    def progress(stage: str, step: int, metrics: dict[str, float]) -> None:
        every = getattr(recipe, stage).checkpoint_every
        if step % every and step != getattr(recipe, stage).steps:
            return
        total = getattr(recipe, stage).steps
        line = {"stage": stage, "step": step, "of": total, **metrics, "seconds": round(time.monotonic() - started, 1)}
        if rank == 0:
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        ray.train.report(line)

    prepare = (lambda stage: stage) if world == 1 else ray.train.torch.prepare_model
    out = train_base(
        recipe,
        load_faces(recipe.faces, recipe.model.image_size),
        prepare=prepare,
        barrier=torch.distributed.barrier if world > 1 else lambda: None,
        rank=rank,
        world=world,
        progress=progress,
    )
    if rank == 0:
        print(f"wrote {out}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=None, help="YAML file; its keys are those of TrainBaseConfig")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        config = placed(load_config(TrainBaseConfig, arguments.config, arguments.overrides))
    except ValueError as error:
        print(f"train_base: {error}", file=sys.stderr)
        return 2
    values = to_dict(config)
    if arguments.dry_run:
        print(json.dumps(values, indent=2))
        return 0

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from lora_diffusion.jobs.local_ray import Need, connect

    needs = Need(
        "training",
        "num_workers, cpus_per_worker and use_gpu",
        config.cpus_per_worker,
        config.use_gpu,
        config.num_workers,
    )
    connect(arguments.ray_address, [needs])
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": values},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=config.name, storage_path=config.storage, failure_config=FailureConfig(max_failures=3)
        ),
    )
    result = trainer.fit()
    print(json.dumps({"metrics": result.metrics, "out": config.recipe.out}, indent=2, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
