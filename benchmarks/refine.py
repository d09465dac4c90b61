"""Fine-tuning from a synthesised LoRA against a cold start: how many steps does the synthesiser save?

    python benchmarks/refine.py                                # the shipped synthesiser, 24 held-out people, 8 minutes
    python benchmarks/refine.py --people 8 --steps 0 20 --synthesizer runs/tiny/training/synthesizer

Both fine-tune on the same photos by the corpus' recipe, with its schedule stretched over the steps at hand. The synthesiser
sees the first photo only; what is drawn is compared with the others. Writes benchmarks/results/refine.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result
from judge import Judge, embedders
from quality import ROOT, photos_of

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.synthesis import Synthesizer
from lora_diffusion.synthesis.inversion import refine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthesizer", default="tiny")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--first", type=int, default=80_000)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10, 20, 40, 80])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[], help="learning rates, besides the recipe's, for warm starts"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(CorpusConfig, ROOT / "configs/tiny.yaml")
    maker, synthesizer = LoRAMaker(config), Synthesizer.from_pretrained(args.synthesizer)
    synthesizer.check_base(maker.base)
    if synthesizer.layout.layout_id != maker.layout.layout_id:
        raise SystemExit("the synthesiser makes LoRAs of another layout than configs/tiny.yaml")
    by = embedders(args.threads)
    people = [photos_of(args.first + i, args.photos, by["recogniser"]) for i in range(args.people)]
    judge = Judge(maker, config, people, by)
    assert maker.start_1N is not None
    starts = {
        "cold": maker.start_1N.expand(len(people), -1),
        "synthesised": torch.from_numpy(synthesizer.from_embedding(judge.faces(), seed=0)),
    }

    rows: list[dict[str, Any]] = []
    for start, start_KN in starts.items():
        for steps in args.steps:
            for rate in [config.finetune.learning_rate, *(args.rates if start != "cold" and steps else [])]:
                vectors_KN = (
                    start_KN.numpy() if steps == 0 else fine_tuned(maker, people, start_KN, steps, rate, config)
                )
                rows.append({"start": start, "steps": steps, "learning_rate": rate, **judge(vectors_KN)})
                print(rows[-1], flush=True)
    result = {
        "synthesizer": args.synthesizer,
        "people": args.people,
        "first": args.first,
        "photos": args.photos,
        "rows": rows,
    }
    print(write_result("refine", result))


def fine_tuned(
    maker: LoRAMaker, people: list[Any], start_KN: torch.Tensor, steps: int, rate: float, config: CorpusConfig
) -> np.ndarray:
    recipe, size = replace(config.finetune, learning_rate=rate), config.people_per_group
    parts = [
        refine(maker.base, maker.layout, people[i : i + size], start_KN[i : i + size], steps, recipe).vectors_KN
        for i in range(0, len(people), size)
    ]
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
