#!/usr/bin/env python
"""What runs/sd15.sh costs: seconds, GPU-hours and money of each step, from the seconds in benchmarks/results/sd15_gpu.json.

    runs/sd15.sh --dry-run --price 2.50            PEOPLE=2000 and GPUS=8, unless the environment says other
    python runs/sd15_cost.py --people 65000 --gpus 32 --price 1.2 --picture-steps 10000

measured: this work was timed on that GPU, with random weights, which cost what trained ones do. estimate: its arithmetic
(FLOP, bytes) was divided by a speed that we assume, which stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_diffusion.config import load_config
from lora_diffusion.evaluation import EvaluationConfig
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.meter import duration

ROOT = Path(__file__).resolve().parents[1]
MATRIX_TFLOPS = 150.0  # sustained by the training of large linear layers in bfloat16, assumed
STEP_SECONDS = 0.005  # launching a training step's kernels and AdamW, assumed
DECODER_TFLOP = 7.5  # the VAE's decoder at 512 px: 2.5 forward, three times that with the backward
METHODS = 12  # rows of the evaluation's table: controls, baselines, scales


@dataclass(frozen=True)
class Cost:
    step: str
    seconds: float  # of one GPU
    how: str


def costs(people: int, held_out: int, picture_steps: int) -> list[Cost]:
    result = json.loads((ROOT / "benchmarks/results/sd15_gpu.json").read_text())
    corpus = load_config(CorpusConfig, ROOT / "configs/sd15.yaml")
    train = load_config(TrainConfig, ROOT / "configs/train_sd15.yaml")
    limit = EvaluationConfig(synthesizers={"ours": "x"}).limit or held_out
    K = corpus.people_per_group
    tuned = next(row["seconds_per_lora_step"] for row in result["finetune"]["rows"] if row["way"] == f"K={K}")
    drawn = 1 / result["render"]["images_per_second"]["bank"]
    pictures = len(corpus.score.prompts) * corpus.score.seeds_per_prompt
    each = corpus.finetune.steps * tuned + pictures * drawn
    told = (
        f"measured: {corpus.finetune.steps} steps x {1000 * tuned:.1f} ms, {pictures} pictures x {drawn:.2f} s a person"
    )
    forward = drawn / (result["render"]["steps"] * 2)  # with guidance, and the decoder's share
    learned = tuned / (corpus.finetune.batch_size + corpus.finetune.prior_batch_size)
    p, rows = train.pictures, train.pictures_training.batch_size * train.pictures.pictures_each
    picture = (p.num_inference_steps - p.gradient_steps) * forward + p.gradient_steps * learned
    picture += DECODER_TFLOP / MATRIX_TFLOPS
    found = [
        Cost("corpus", people * each, told),
        Cost("held-out corpus", held_out * each, told),
        trained("vae", train, result["synthesize"]["vae_parameters"]),
        trained("denoiser", train, result["synthesize"]["denoiser_parameters"]),
    ]
    if picture_steps:
        how = f"estimate: {rows} pictures x {picture:.2f} s a step, of which UNet passes are measured and the decoder is assumed"
        found.append(Cost("pictures", picture_steps * rows * picture, how))
    shown = METHODS * min(limit, held_out) * 4
    return [
        *found,
        Cost(
            "evaluation",
            shown * drawn,
            f"{METHODS} methods x {min(limit, held_out)} people x 4 pictures, measured each",
        ),
    ]


def trained(name: str, train: TrainConfig, parameters: int) -> Cost:
    loop: Any = getattr(train, f"{name}_training")
    flop = 6 * parameters * loop.batch_size / 1e12
    seconds = flop / MATRIX_TFLOPS + STEP_SECONDS
    how = f"estimate: {loop.steps:,} steps of {flop:.2f} TFLOP at {MATRIX_TFLOPS:g} TFLOP/s and {1000 * STEP_SECONDS:g} ms"
    return Cost(name, loop.steps * seconds, how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=2000, help="of the corpus (default: 2000)")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--picture-steps", type=int, default=0, help="of the stage `pictures` (default: none)")
    parser.add_argument("--gpus", type=int, default=8, help="that share the corpora and the evaluation (default: 8)")
    parser.add_argument("--price", type=float, help="of one GPU-hour")
    args = parser.parse_args()
    found = costs(args.people, args.held_out, args.picture_steps)
    alone = ("vae", "denoiser", "pictures")
    for cost in found:
        hours = cost.seconds / 3600
        money = "" if args.price is None else f"{hours * args.price:>10,.2f}"
        print(f"{cost.step:16}{cost.seconds:>12,.0f} s{hours:>9.2f} GPU-h{money}   {cost.how}")
    total = sum(cost.seconds for cost in found)
    clock = sum(cost.seconds / (1 if cost.step in alone else args.gpus) for cost in found)
    money = "" if args.price is None else f"{total / 3600 * args.price:>10,.2f}"
    print(f"{'in all':16}{total:>12,.0f} s{total / 3600:>9.2f} GPU-h{money}")
    print(
        f"by the clock: {duration(clock)} on {args.gpus} GPUs, the training on one of them. Seconds of an NVIDIA H200,"
    )
    print("without the start of machines, the class images of each worker and the loading of models.")


if __name__ == "__main__":
    main()
