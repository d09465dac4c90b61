#!/usr/bin/env python
"""Learn where every fine-tuning starts: one A for all, from people that the base model was trained on.

jobs/world/make_faces.py --people 200:264 --views 10 --out runs/tiny/start_people
jobs/world/learn_start.py configs/tiny.yaml people=runs/tiny/start_people out=runs/tiny/start.safetensors

The YAML file is the corpus': base model, layers, photos, recipe. One process on one device. Set `lora.start` of the corpus to
the file that comes out.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.jobs.run import Job, run_job
from lora_diffusion.lora.shared_start import StartConfig


@dataclass(frozen=True)
class Config(CorpusConfig):
    """training: of the start. out: the file, which ends in .safetensors."""

    training: StartConfig = field(default_factory=StartConfig)
    out: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out is {self.out!r}; give a file that ends in .safetensors")


def dry_run(config: Config) -> str:
    return f"{config.training.steps:,} steps of {config.training.people_per_step} people of {config.people} -> {config.out}"


def run(config: Config, ray_address: str) -> None:
    from lora_diffusion.factory.embed import PersonEmbedder
    from lora_diffusion.lora import formats
    from lora_diffusion.lora.layout import LoRALayout
    from lora_diffusion.lora.shared_start import learn_start
    from lora_diffusion.models.stable_diffusion import BaseModel

    start = config.training
    base = BaseModel.from_pretrained(config.base, config.device)
    layout = LoRALayout.from_unet(base.unet, config.lora.rank, config.lora.target_modules, config.lora.alpha)
    embedder = PersonEmbedder(config, base.image_size)
    embedded = [embedder(place, person) for place, person in enumerate(embedder.source.list_people())]
    people = [person.photos() for person in embedded if person.usable]
    print(f"{len(people)} people of {len(embedded)}, {layout.size:,} floats a LoRA", flush=True)

    losses: list[float] = []
    began = time.monotonic()

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if (step + 1) % 20 == 0:
            seconds = time.monotonic() - began
            left = seconds / len(losses) * (start.steps - len(losses))
            print(f"step {step + 1}/{start.steps}, loss {sum(losses[-20:]) / 20:.4f}, {left:.0f} s left", flush=True)

    vector_N = learn_start(base, layout, people, start, config.finetune, report)
    metadata = {"base": base.fingerprint, "people": str(len(people)), "steps": str(start.steps)}
    print(formats.save(vector_N, layout, config.out, "vector", metadata=metadata))


if __name__ == "__main__":
    sys.exit(run_job(Job("learn_start", "__main__")))
