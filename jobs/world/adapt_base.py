#!/usr/bin/env python
"""Train a base model further, so that fine-tuning on it finds a new person soon (lora_diffusion/world/base/adaptation.py).

jobs/world/make_faces.py --people 0:8000 --views 10 --out runs/base_faces
jobs/world/adapt_base.py --config configs/tiny.yaml --faces runs/base_faces --work runs/adapted --out runs/adapted/tiny-sd
jobs/world/learn_start.py --config configs/tiny.yaml --out runs/start.safetensors people=runs/tiny/start_people \\
    base=runs/adapted/tiny-sd lora.start=null

One process on one device; the same command goes on where a killed one stopped. Then learn a start on the result: the one
that the training began with no longer fits it.
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
from lora_diffusion.factory.make import resolve_device
from lora_diffusion.lora.finetune import initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.shared_start import load_start
from lora_diffusion.models.stable_diffusion import BaseModel, resolve_model
from lora_diffusion.storage import StoreError
from lora_diffusion.world.base.adaptation import AdaptationConfig, BaseAdapter
from lora_diffusion.world.base.adaptation_faces import AdaptationFaces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the corpus: base model, layers, recipe, start")
    parser.add_argument(
        "--faces", required=True, metavar="URI", help="photos of the base split, by jobs/world/make_faces.py"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the pipeline that comes out")
    add_settings(parser, AdaptationConfig)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        config = load_config(CorpusConfig, args.config, args.overrides)
        adaptation = read_settings(args, AdaptationConfig)
        run(config, adaptation, args.faces, args.work, args.out)
    except FileNotFoundError as error:
        sys.exit(
            f"adapt_base: {error}; draw photos first: jobs/world/make_faces.py --people 0:8000 --views 10 --out {args.faces}"
        )
    except (ValueError, StoreError) as error:
        sys.exit(f"adapt_base: {error}")


def run(config: CorpusConfig, adaptation: AdaptationConfig, faces_uri: str, work: Path, out: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        resolve_model(config.base), torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    base = BaseModel.from_pipeline(pipe, resolve_device(config.device), config.base)
    layout = LoRALayout.from_unet(base.unet, config.lora.rank, config.lora.target_modules, config.lora.alpha)
    if config.lora.start is None:
        start_N = initial_vectors(layout, adaptation.seed)[0]
    else:
        start_N = load_start(config.lora.start, layout, base)
    faces = AdaptationFaces.load(faces_uri, base, config.finetune.face_weight)
    print(f"{faces.people} people, {len(faces.latents):,} photos", flush=True)
    adapter = BaseAdapter(base, layout, start_N, faces, adaptation, config.finetune, work)
    began, first = time.monotonic(), adapter.step

    def report(step: int, values: dict[str, float]) -> None:
        if step % 20 == 0 or step == adaptation.steps:
            left = (time.monotonic() - began) / (step - first) * (adaptation.steps - step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {step}/{adaptation.steps}, {shown}, {left:.0f} s left", flush=True)

    adapter.run(report)
    # float16 on disk but for the text encoder, as in world.base.recipe.train_base
    pipe.to("cpu")
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(out, safe_serialization=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
