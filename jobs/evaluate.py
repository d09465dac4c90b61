#!/usr/bin/env python
"""How good a synthesiser is, on people it never saw, against every control and baseline (Ray Data).

    ray job submit jobs/evaluate.py                              # configs/evaluate.yaml
    python jobs/evaluate.py synthesizers.denoiser=runs/tiny/synthesizer limit=16
    python jobs/evaluate.py --config my.yaml output=s3://bucket/evaluation --dry-run

Writes results.json, report.html and contact sheets to `output`. Pictures are drawn once: the same command goes on where a
killed one stopped, and a method whose LoRAs are unchanged is not drawn again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# `ray job submit` runs this file with jobs/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
from causes import find_cause

from lora_diffusion.config import load_config, to_yaml
from lora_diffusion.evaluation import EvaluationConfig
from lora_diffusion.evaluation.pipeline import evaluate
from lora_diffusion.storage import StoreError, placed

sys.path.insert(0, str(Path(__file__).resolve().parent))
from local_ray import connect
from ray_scoring import USER_ERRORS, OnRay

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "evaluate.yaml"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        config = placed(load_config(EvaluationConfig, args.config, args.overrides))
        if args.dry_run:
            print(to_yaml(config))
            return 0
        return run(config, args.ray_address)
    except (ValueError, StoreError, ray.exceptions.RayError) as error:
        cause = find_cause(error, USER_ERRORS, (ray.exceptions.RayError,))
        if cause is None:
            raise
        print(f"evaluate: {cause}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration; touch nothing")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example limit=16")
    return parser.parse_args(arguments)


def run(config: EvaluationConfig, ray_address: str) -> int:
    connect(ray_address)
    evaluate(config, OnRay())
    print(f"results: {config.output}/results.json   report: {config.output}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
