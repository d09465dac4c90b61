"""Which parts of the synthesiser matter: one setting changed at a time, several seeds, scored on held-out people (Ray).

    ray job submit jobs/ablate.py                                          # configs/ablate.yaml
    jobs/ablate.py factors='[conditioning, code_space]' seeds=1            # a first look
    jobs/ablate.py --dry-run                                               # lists the runs

Writes ablations.jsonl (a line for each run), ablations.json (the table) and ablations.html to `evaluation.output`. The same
command goes on where a killed one stopped: finished runs are not trained again, drawn pictures are not drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from lora_diffusion.evaluation.ablation import AblationConfig, Variant, plan, run_name, train_parts, train_run
from lora_diffusion.evaluation.ablation_pipeline import ablate
from lora_diffusion.evaluation.ablation_results import Record
from lora_diffusion.jobs.local_ray import connect
from lora_diffusion.jobs.scoring import LESS_MEMORY, OnRay, needs
from lora_diffusion.synthesis.training.dataset import take_snapshot

__all__ = ["LESS_MEMORY", "Config", "dry_run", "run"]
Config = AblationConfig


def dry_run(config: AblationConfig) -> str:
    return "\n".join(run_name(config, v) for v in plan(config, take_snapshot(config.evaluation.corpus).num_rows))


def run(config: AblationConfig, ray_address: str) -> None:
    connect(ray_address, needs(config.evaluation, "evaluation."))
    ablate(config, OnRay(), TrainOnRay())
    print(f"table: {config.output}/ablations.json   page: {config.output}/ablations.html")


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
