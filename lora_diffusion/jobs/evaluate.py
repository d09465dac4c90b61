"""How good a synthesiser is, on people it never saw, against every control and baseline (Ray Data).

    ray job submit jobs/evaluate.py                              # configs/evaluate.yaml
    lora-diffusion evaluate synthesizers.denoiser=runs/tiny/training/synthesizer limit=16
    lora-diffusion evaluate my.yaml output=s3://bucket/evaluation --dry-run

Writes results.json, report.html and contact sheets to `output`. Pictures are drawn once: the same command goes on where a
killed one stopped, and a method whose LoRAs are unchanged is not drawn again.
"""

from __future__ import annotations

from lora_diffusion.artifacts.identity import read_identity
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.evaluation import EvaluationConfig
from lora_diffusion.evaluation.pipeline import evaluate
from lora_diffusion.jobs.local_ray import connect
from lora_diffusion.jobs.scoring import LESS_MEMORY, OnRay, needs

__all__ = ["LESS_MEMORY", "Config", "dry_run", "run"]
Config = EvaluationConfig


def dry_run(config: EvaluationConfig) -> str:
    for corpus in (config.corpus, config.held_out):
        CorpusReader(corpus)
    for name, folder in config.synthesizers.items():
        try:
            read_identity(folder)
        except ValueError as error:
            raise ValueError(f"synthesizers.{name}: {error}") from error
    return f"{', '.join(config.synthesizers)} on {config.limit or 'all'} people of {config.held_out} -> {config.output}"


def run(config: EvaluationConfig, ray_address: str) -> None:
    connect(ray_address, needs(config))
    evaluate(config, OnRay())
    print(f"results: {config.output}/results.json   report: {config.output}/report.html")
