#!/usr/bin/env python
"""Which parts of the synthesiser matter: one setting changed at a time, several seeds, scored on held-out people (Ray).

    ray job submit jobs/ablate.py                                          # configs/ablate.yaml
    python jobs/ablate.py factors='[conditioning, code_space]' seeds=1     # a first look
    python jobs/ablate.py --dry-run                                        # lists the runs

Writes ablations.jsonl (a line for each run), ablations.json (the table) and ablations.html to `evaluation.output`. The same
command goes on where a killed one stopped: finished runs are not trained again, drawn pictures are not drawn again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# `ray job submit` runs this file with jobs/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
from causes import find_cause

from lora_diffusion.config import load_config, to_yaml
from lora_diffusion.evaluation.ablation import AblationConfig, Variant, plan, run_name, train_parts, train_run
from lora_diffusion.evaluation.ablation_pipeline import ablate
from lora_diffusion.evaluation.ablation_results import Record
from lora_diffusion.storage import StoreError, placed
from lora_diffusion.synthesis.training.dataset import take_snapshot

sys.path.insert(0, str(Path(__file__).resolve().parent))
from local_ray import connect
from ray_scoring import USER_ERRORS, OnRay

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "ablate.yaml"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        config = placed(load_config(AblationConfig, args.config, args.overrides))
        return dry_run(config) if args.dry_run else run(config, args.ray_address)
    except (ValueError, StoreError, ray.exceptions.RayError) as error:
        cause = find_cause(error, USER_ERRORS, (ray.exceptions.RayError,))
        if cause is None:
            raise
        print(f"ablate: {cause}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the runs; touch nothing")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example seeds=1")
    return parser.parse_args(arguments)


def dry_run(config: AblationConfig) -> int:
    print(to_yaml(config))
    for variant in plan(config, take_snapshot(config.evaluation.corpus).num_rows):
        print(run_name(config, variant))
    return 0


def run(config: AblationConfig, ray_address: str) -> int:
    connect(ray_address)
    ablate(config, OnRay(), TrainOnRay())
    print(f"table: {config.output}/ablations.json   page: {config.output}/ablations.html")
    return 0


class TrainOnRay:
    """`evaluation.ablation_pipeline.Trainers`: a task for each training, as many at a time as there are CPUs."""

    def parts(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterator[str]:
        return in_tasks(train_parts, config, variants)

    def runs(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterator[Record]:
        return in_tasks(train_run, config, variants)


def in_tasks(function: Callable[..., Any], config: AblationConfig, variants: Sequence[Variant]) -> Iterator[Any]:
    """Results as they come. A task's process is used again: the models are small."""
    task = ray.remote(num_cpus=config.evaluation.worker_cpus)(function)
    waiting = [task.remote(config, variant) for variant in variants]
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(ready)


if __name__ == "__main__":
    sys.exit(main())
