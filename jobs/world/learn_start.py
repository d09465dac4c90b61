#!/usr/bin/env python
"""Learn where every fine-tuning starts: one A for all, from people that the base model was trained on.

jobs/world/make_faces.py --people 200:264 --views 10 --out runs/tiny/start_people
jobs/world/learn_start.py --config configs/tiny.yaml --out runs/tiny/start.safetensors people=runs/tiny/start_people

One process on one device. Set `lora.start` of the corpus to the file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a test loads it

from settings import add_settings, read_settings

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import PersonEmbedder
from lora_diffusion.factory.make import resolve_device
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.shared_start import StartConfig, learn_start
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import StoreError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the corpus: base model, layers, photos")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    add_settings(parser, StartConfig)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        config = load_config(CorpusConfig, args.config, args.overrides)
        run(config, read_settings(args, StartConfig), args.out)
    except (ValueError, StoreError) as error:
        sys.exit(f"learn_start: {error}")


def run(config: CorpusConfig, start: StartConfig, out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is {out}; give a file that ends in .safetensors")
    base = BaseModel.from_pretrained(config.base, resolve_device(config.device))
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
    print(formats.save(vector_N, layout, out, "vector", metadata=metadata))


if __name__ == "__main__":
    main()
