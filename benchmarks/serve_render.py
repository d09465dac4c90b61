"""Many people in one batch against one after the other.

    python benchmarks/serve_render.py                  # 16 people, 20 steps, rounds A B C D A B C D ...

A bank: the endpoint's running batch, 16 different people. B one_by_one: diffusers' `load_lora_weights`, draw, `unload_lora_weights`.
C peft: 16 adapters in one batch (`adapter_names`). D same_person: `render` with one LoRA for all 16.
All draw the same prompts, seeds, steps and guidance; A, B and C must agree on the pictures. Writes benchmarks/results/serve_render.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

from lora_diffusion.lora import formats
from lora_diffusion.lora.rendering import initial_noise, make_scheduler, render
from lora_diffusion.models.stable_diffusion import BaseModel, resolve_model
from lora_diffusion.serving.engine import Picture, RenderEngine
from lora_diffusion.synthesis import Synthesizer

GUIDANCE = 2.0
PROMPT = "a photo of sks person, studio light, grey studio background"


def load_pipeline(name: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        resolve_model(name), safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


class Contest:
    """The four ways, over the same people. Each gives pictures (K, H, W, 3) uint8."""

    def __init__(self, name: str, synthesizer: str, people: int, steps: int, folder: Path) -> None:
        self.steps = steps
        self.seeds = list(range(people))
        self.pipe = load_pipeline(name)
        self.base = BaseModel.from_pipeline(load_pipeline(name), name=name)
        model = Synthesizer.from_pretrained(synthesizer)
        model.check_base(self.base)
        self.layout = model.layout
        faces_KC = np.random.default_rng(0).standard_normal((people, model.condition_size))
        self.vectors_KN = model.from_embedding(faces_KC)
        self.engine = RenderEngine(self.base, self.layout)
        self.files = [
            formats.save(vector, self.layout, folder / f"{k}.safetensors") for k, vector in enumerate(self.vectors_KN)
        ]
        self.adapters = self._adapters(name, folder)

    def _adapters(self, name: str, folder: Path) -> Any:
        from peft import PeftModel

        folders = [
            formats.save(vector, self.layout, folder / f"peft-{k}", "peft") for k, vector in enumerate(self.vectors_KN)
        ]
        model = PeftModel.from_pretrained(load_pipeline(name).unet, str(folders[0]), adapter_name="person0")
        for k, path in enumerate(folders[1:], 1):
            model.load_adapter(str(path), adapter_name=f"person{k}")
        return model.eval()

    def bank(self) -> np.ndarray:
        people = zip(self.vectors_KN, self.seeds, strict=True)
        rows = self.engine.admit([Picture(v, PROMPT, "", seed, GUIDANCE, self.steps) for v, seed in people])
        while self.engine.rows:
            self.engine.advance()
        return np.stack([row.pixels_HWC for row in rows if row.pixels_HWC is not None])

    def same_person(self) -> np.ndarray:
        people = len(self.seeds)
        return render(
            self.base,
            self.vectors_KN[:1],
            [PROMPT] * people,
            self.seeds,
            bank=self.engine.bank,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
        )

    def one_by_one(self) -> np.ndarray:
        pictures = []
        for file, seed in zip(self.files, self.seeds, strict=True):
            self.pipe.load_lora_weights(str(file))
            images = self.pipe(
                PROMPT,
                num_inference_steps=self.steps,
                guidance_scale=GUIDANCE,
                latents=initial_noise(self.base, [seed]),
                output_type="np",
            ).images
            self.pipe.unload_lora_weights()
            pictures.append((images[0] * 255).round().astype(np.uint8))
        return np.stack(pictures)

    @torch.no_grad()
    def peft(self) -> np.ndarray:
        people = len(self.seeds)
        names = [f"person{k}" for k in range(people)] * 2
        scheduler = make_scheduler(self.base)
        scheduler.set_timesteps(self.steps)
        text = self.base.encode_prompts(["", PROMPT]).repeat_interleave(people, 0)
        latents = initial_noise(self.base, self.seeds)
        for t in scheduler.timesteps:
            output = self.adapters(
                torch.cat([latents, latents]), t, encoder_hidden_states=text, adapter_names=names
            ).sample
            unconditioned, conditioned = output.chunk(2)
            guided = unconditioned + GUIDANCE * (conditioned - unconditioned)
            latents = scheduler.step(guided, t, latents).prev_sample
        return self.base.decode(latents)


def differing(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pixels that differ by more than two grey levels."""
    return float((np.abs(a.astype(int) - b.astype(int)) > 2).mean())


def race(ways: dict[str, Callable[[], np.ndarray]], rounds: int, people: int) -> dict[str, Any]:
    """Median images/s of each way, the ways in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: round(people / float(np.median(seconds)), 3) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny-sd")
    parser.add_argument("--synthesizer", default="tiny", help="whose layout and LoRAs are drawn")
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="serve_render")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(args.base, args.synthesizer, args.people, args.steps, Path(folder))
        pictures = {"bank": contest.bank(), "one_by_one": contest.one_by_one(), "peft": contest.peft()}
        agreement = {name: differing(pictures["bank"], pictures[name]) for name in ("one_by_one", "peft")}
        ways = {
            "bank": contest.bank,
            "one_by_one": contest.one_by_one,
            "peft": contest.peft,
            "same_person": contest.same_person,
        }
        speed = race(ways, args.rounds, args.people)
    result = {
        "people": args.people,
        "steps": args.steps,
        "threads": args.threads,
        "share_of_pixels_that_differ_from_bank": agreement,
        "images_per_second": speed,
        "bank_against_one_by_one": round(speed["bank"] / speed["one_by_one"], 2),
        "bank_against_peft_in_one_batch": round(speed["bank"] / speed["peft"], 2),
        "cost_of_different_people": round(speed["same_person"] / speed["bank"] - 1, 4),
    }
    print(result)
    print(write_result(args.name, result))


if __name__ == "__main__":
    main()
