#!/usr/bin/env python
"""Train a base model further, so that fine-tuning on it finds a new person soon (lora_diffusion/world/base/adaptation.py).

jobs/world/make_faces.py --people 0:8000 --views 10 --out runs/base_faces
jobs/world/adapt_base.py configs/tiny.yaml faces=runs/base_faces work=runs/adapted out=runs/adapted/tiny-sd
jobs/world/learn_start.py configs/tiny.yaml people=runs/tiny/start_people base=runs/adapted/tiny-sd out=runs/start.safetensors

The YAML file is the corpus': base model, layers, recipe, start. One process on one device; the same command goes on where a
killed one stopped. Then learn a start on the result: the one that the training began with no longer fits it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.jobs.run import Job, run_job
from lora_diffusion.places import Output, Place
from lora_diffusion.world.base.adaptation import AdaptationConfig


@dataclass(frozen=True)
class Config(CorpusConfig):
    """faces: photos of the base split, by jobs/world/make_faces.py. work: of the checkpoint. out: of the pipeline's folder."""

    training: AdaptationConfig = field(default_factory=AdaptationConfig)
    faces: Place = "runs/base_faces"
    work: Output = "runs/adapted"
    out: Output = "runs/adapted/tiny-sd"


def dry_run(config: Config) -> str:
    t = config.training
    return f"{t.steps:,} steps of {t.people_per_step} people and {t.described_photos} photos -> {config.out}"


def run(config: Config, ray_address: str) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from lora_diffusion.lora.finetune import initial_vectors
    from lora_diffusion.lora.layout import LoRALayout
    from lora_diffusion.lora.shared_start import load_start
    from lora_diffusion.models.stable_diffusion import BaseModel, resolve_model
    from lora_diffusion.world.base.adaptation import BaseAdapter
    from lora_diffusion.world.base.adaptation_faces import AdaptationFaces

    pipe = StableDiffusionPipeline.from_pretrained(
        resolve_model(config.base), torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    base = BaseModel.from_pipeline(pipe, config.device, config.base)
    layout = LoRALayout.from_unet(base.unet, config.lora.rank, config.lora.target_modules, config.lora.alpha)
    if config.lora.start is None:
        start_N = initial_vectors(layout, config.training.seed)[0]
    else:
        start_N = load_start(config.lora.start, layout, base)
    try:
        faces = AdaptationFaces.load(config.faces, base, config.finetune.face_weight)
    except FileNotFoundError as error:
        how = f"jobs/world/make_faces.py --people 0:8000 --views 10 --out {config.faces}"
        raise ValueError(f"{error}; draw photos first: {how}") from error
    print(f"{faces.people} people, {len(faces.latents):,} photos", flush=True)
    adapter = BaseAdapter(base, layout, start_N, faces, config.training, config.finetune, Path(config.work))
    began, first = time.monotonic(), adapter.step

    def report(step: int, values: dict[str, float]) -> None:
        if step % 20 == 0 or step == config.training.steps:
            left = (time.monotonic() - began) / (step - first) * (config.training.steps - step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {step}/{config.training.steps}, {shown}, {left:.0f} s left", flush=True)

    adapter.run(report)
    # float16 on disk but for the text encoder, as in world.base.recipe.train_base
    pipe.to("cpu")
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(config.out, safe_serialization=True)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    sys.exit(run_job(Job("adapt_base", "__main__")))
