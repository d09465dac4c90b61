"""How long one embedding takes to become a LoRA vector, alone and in batches, against fine-tuning one person.

python benchmarks/synthesize.py                                 # the shipped synthesiser
python benchmarks/synthesize.py --synthesizer runs/tiny/training/synthesizer --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

from lora_diffusion.config import from_dict
from lora_diffusion.lora.finetune import Finetuner
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis import Synthesizer


def milliseconds(synthesizer: Synthesizer, batch: int, repeats: int, **settings: float) -> list[float]:
    """Embeddings (batch, 512) -> vectors (batch, N), each time other faces and seeds."""
    rng = np.random.default_rng(0)
    found = []
    for repeat in range(repeats + 3):
        faces = rng.standard_normal((batch, synthesizer.condition_size)).astype(np.float32)
        start = time.perf_counter()
        synthesizer.from_embedding(faces, seed=repeat, **settings)  # type: ignore[arg-type]
        found.append(1000 * (time.perf_counter() - start))
    return found[3:]  # the first calls fill caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthesizer", default="tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--base", default="tiny-sd", help="the base model that fine-tuning is timed on")
    parser.add_argument("--no-finetune", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    synthesizer = Synthesizer.from_pretrained(args.synthesizer)
    rows = []
    for guidance in (1.0, 2.0):
        alone = milliseconds(synthesizer, 1, args.repeats, guidance_scale=guidance)
        together = milliseconds(synthesizer, 64, max(5, args.repeats // 5), guidance_scale=guidance)
        p50 = statistics.median(alone)
        rows.append(
            {
                "guidance_scale": guidance,
                "one_face_p50_ms": round(p50, 2),
                "one_face_p95_ms": round(float(np.percentile(alone, 95)), 2),
                "batch_of_64_p50_ms": round(statistics.median(together), 2),
                "batch_of_64_over_one": round(statistics.median(together) / p50, 2),
            }
        )
        print(rows[-1])
    result: dict[str, Any] = {
        "threads": args.threads,
        "code_space": synthesizer.codes.kind,
        "code_size": synthesizer.code_size,
        "vector_size": synthesizer.layout.size,
        "rows": rows,
    }
    if not args.no_finetune:
        seconds, steps = fine_tuning_seconds(synthesizer, args.base)
        result |= {
            "fine_tuning_one_person_s": round(seconds, 2),
            "fine_tuning_steps": steps,
            "times_faster": round(1000 * seconds / rows[0]["one_face_p50_ms"], 1),
        }
    print(write_result("synthesize", result))


def fine_tuning_seconds(synthesizer: Synthesizer, base_name: str, steps: int = 20) -> tuple[float, int]:
    """Of one person alone, by the corpus' recipe: (seconds for all its steps, steps), measured over the first few."""
    base = BaseModel.from_pretrained(base_name)
    config = from_dict(FinetuneConfig, synthesizer.provenance.finetune)
    size = base.image_size
    photos = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    tuner = Finetuner(base, synthesizer.layout, replace(config, steps=steps, average_last=0))
    box = np.array([0.25, 0.25, 0.75, 0.75], np.float32) * size
    person = PersonPhotos("one", photos, face_boxes=np.tile(box, (len(photos), 1)))
    seconds = min(tuner([person]).seconds for _ in range(3))
    return seconds / steps * config.steps, config.steps


if __name__ == "__main__":
    main()
