#!/usr/bin/env python
"""Train the decoder of a base model's autoencoder on, so that pictures are sharp (lora_diffusion/world/base/decoder.py).

jobs/world/make_faces.py --people 30000:31000 --views 6 --out runs/decoder_faces
jobs/world/sharpen_decoder.py faces=runs/decoder_faces work=runs/decoder out=runs/decoder/tiny-sd

Encoder and UNet stay as they are, and so do all LoRAs. One process on the CPU; the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.jobs.run import Job, run_job
from lora_diffusion.places import Output, Place, PlaceOrName
from lora_diffusion.training.loop import LoopConfig
from lora_diffusion.world.base.decoder import DecoderWeights


@dataclass(frozen=True)
class Config:
    """faces: photos by jobs/world/make_faces.py. work: of latents and checkpoints. out: of the pipeline's folder."""

    base: PlaceOrName = "tiny-sd"
    faces: Place = "runs/decoder_faces"
    work: Output = "runs/decoder"
    out: Output = "runs/decoder/tiny-sd"
    training: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=2000, batch_size=8, learning_rate=4e-4, warmup=50, weight_decay=0.0, betas=(0.5, 0.99), clip_norm=20.0,
            ema_decay=0.995,
        )
    )  # fmt: skip
    bfloat16: bool = True  # autocast; weights and optimiser stay float32
    weights: DecoderWeights = field(default_factory=DecoderWeights)


def dry_run(config: Config) -> str:
    return f"{config.training.steps:,} steps of {config.training.batch_size} photos -> {config.out}"


def run(config: Config, ray_address: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from lora_diffusion.models.stable_diffusion import BaseModel, resolve_model
    from lora_diffusion.storage import open_store
    from lora_diffusion.training.loop import Loop
    from lora_diffusion.world.base.decoder import DecoderStage, latents_for_decoder, recogniser_features
    from lora_diffusion.world.base.recipe import load_faces

    base = BaseModel.from_pretrained(config.base)
    faces = load_faces(config.faces, base.image_size)
    made, work = Path(config.work) / "latents.safetensors", open_store(config.work)
    if not made.exists():
        print(f"{len(faces.images):,} photos: the UNet draws their latents", flush=True)
        made.parent.mkdir(parents=True, exist_ok=True)
        save_file(latents_for_decoder(base, faces.images, [c[0] for c in faces.captions]), made.with_suffix(".tmp"))
        made.with_suffix(".tmp").rename(made)
    stage = DecoderStage(base.vae, faces.images, load_file(made), recogniser_features(), config.weights)
    loop = Loop("decoder", stage, config.training, work, bfloat16=config.bfloat16)

    def report(values: dict[str, Any]) -> None:
        shown = ", ".join(f"{name} {values[name]:.4f}" for name in ("loss", *vars(config.weights), "discriminator"))
        print(f"step {values['step']}/{values['of']}, {shown}, {values['seconds_left']:.0f} s left", flush=True)

    loop.run(report)
    stage.load_state_dict(loop.best_weights(), strict=False)
    shutil.copytree(resolve_model(config.base), config.out, dirs_exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in base.vae.state_dict().items()}
    save_file(weights, Path(config.out) / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    print(f"wrote {config.out}")


if __name__ == "__main__":
    sys.exit(run_job(Job("sharpen_decoder", "__main__")))
