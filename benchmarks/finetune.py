"""LoRAs per second: K people together against the plain loop of weights2weights, and how much comes from each cause.

    python benchmarks/finetune.py                # about 4 minutes on 2 cores
    python benchmarks/finetune.py --quick        # under a minute, rougher
    python benchmarks/finetune.py --memory 40    # instead: memory of a corpus worker after each of 40 groups

The plain loop is the recipe that made the paper's corpus (weights2weights, arXiv:2406.09413), given to us as favours:
the base model is loaded once, photos are decoded and prompts tokenised beforehand. Every way does the same work: per
step and person one photo and one class image, the same noise, the same number of steps, and it ends in the same LoRA,
which is checked. Ways take turns (A B C ... A B C ...), so that a busy minute hits all of them; medians are shown.

Writes benchmarks/results/finetune.json (or finetune_memory.json).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peft
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_diffusion.config import load_config, to_dict
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule, RandomStreams, TimestepSampler
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = 8  # of each person, and class images


class PlainLoop:
    """DreamBooth by peft and torch.optim.AdamW, one person after the other.

    cached: latents and prompt embeddings are computed once for each person instead of at every step.
    """

    def __init__(
        self, base: BaseModel, layout: LoRALayout, config: FinetuneConfig, class_pixels: np.ndarray, cached: bool
    ) -> None:
        self.base, self.layout, self.config, self.cached = base, layout, config, cached
        lora = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=list(layout.target_modules))
        self.unet = peft.inject_adapter_in_model(lora, copy.deepcopy(base.unet))
        self.lora = [  # A and B of each module, in the order of the layout
            getattr(self.unet.get_submodule(entry.name), part)["default"].weight
            for entry in layout.entries
            for part in ("lora_A", "lora_B")
        ]
        self.class_images = as_images(class_pixels)
        self.tokens_2S = base.tokenizer(
            [config.instance_prompt, config.class_prompt],
            padding="max_length",
            max_length=base.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler, base.device)

    def __call__(self, people: Sequence[PersonPhotos]) -> np.ndarray:
        return np.concatenate([self.fine_tune(person) for person in people])

    def fine_tune(self, person: PersonPhotos) -> np.ndarray:
        config, images = self.config, as_images(person.pixels)
        start = self.layout.split(initial_vectors(self.layout, config.seed))
        with torch.no_grad():
            for weight, matrix in zip(self.lora, (m for pair in start.values() for m in pair), strict=True):
                weight.copy_(matrix[0])
        optimizer = torch.optim.AdamW(
            self.lora,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        streams = RandomStreams([person.identity], config.seed, common=True)
        sample = TimestepSampler(0, len(self.schedule), "uniform")
        if self.cached:
            photo_latents, class_latents = self.encode(images), self.encode(self.class_images)
            text = self.base.text_encoder(self.tokens_2S)[0]
        for step in range(config.steps):
            photo, other = step % len(images), step % len(self.class_images)
            if self.cached:
                x0 = torch.stack([photo_latents[photo], class_latents[other]])
            else:
                x0 = self.encode(torch.stack([images[photo], self.class_images[other]]))
                text = self.base.text_encoder(self.tokens_2S)[0]
            timesteps, noise = (draw[0] for draw in streams.draw(self.base.latent_shape, (1, 1), sample))
            x_t, target = self.schedule.add_noise(x0, noise, timesteps)
            prediction = self.unet(x_t, timesteps, encoder_hidden_states=text).sample
            loss = F.mse_loss(prediction[:1], target[:1]) + config.prior_weight * F.mse_loss(prediction[1:], target[1:])
            loss.backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.lora, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        pairs = zip(self.lora[::2], self.lora[1::2], strict=True)
        matrices = {
            e.name: (A.detach()[None], B.detach()[None]) for e, (A, B) in zip(self.layout.entries, pairs, strict=True)
        }
        return self.layout.join(matrices).numpy()

    def encode(self, images: Tensor) -> Tensor:
        return self.base.vae.encode(images).latent_dist.mean * self.base.vae.config.scaling_factor


def as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclasses.dataclass
class Way:
    """One way to do the work. `cause`: what it changes against the way called `against`."""

    name: str
    against: str | None
    cause: str
    people: int  # in one call
    run: Callable[[Sequence[PersonPhotos]], np.ndarray]
    seconds: list[float] = dataclasses.field(default_factory=list)  # for each LoRA, one entry a round
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)  # of all threads: who shares the machine shows


def random_people(count: int, size: int, seed: int = 0) -> list[PersonPhotos]:
    """What is on a photo costs no time, so noise will do, with the face in the middle."""
    rng = np.random.default_rng(seed)
    boxes = np.tile(np.array([0.25, 0.25, 0.75, 0.75], np.float32) * size, (PHOTOS, 1))
    return [
        PersonPhotos(f"{seed}-{k}", rng.integers(0, 256, (PHOTOS, size, size, 3), np.uint8), face_boxes=boxes)
        for k in range(count)
    ]


def make_ways(base: BaseModel, config: CorpusConfig, steps: int, sizes: Sequence[int]) -> list[Way]:
    """From the plain loop to the corpus job's configuration, one cause after the other."""
    tune = dataclasses.replace(
        config.finetune, steps=steps, batch_size=1, prior_batch_size=1, lr_schedule="constant", average_last=0
    )
    plain = dataclasses.replace(tune, channels_last=False, autocast="off", compile=False, train_A=True)
    class_pixels = random_people(1, base.image_size, seed=1)[0].pixels
    layout = LoRALayout.from_unet(base.unet, config.lora.rank, config.lora.target_modules, config.lora.alpha)

    def finetuner(config: FinetuneConfig) -> Callable[[Sequence[PersonPhotos]], np.ndarray]:
        own = dataclasses.replace(base, unet=copy.deepcopy(base.unet))  # channels_last changes the model it is given
        run = Finetuner(own, layout, config, class_pixels)
        return lambda people: run(people).vectors_KN

    loops = [PlainLoop(base, layout, plain, class_pixels, cached) for cached in (False, True)]
    bank = finetuner(plain)
    ways = [
        Way("plain", None, "weights2weights: peft, AdamW, nothing cached", 1, loops[0]),
        Way("cached", "plain", "latents and prompt embeddings computed once", 1, loops[1]),
        Way("bank K=1", "cached", "a vector and a hook for each layer instead of peft's modules; fused AdamW", 1, bank),
    ]
    for K in sizes:
        ways.append(Way(f"bank K={K}", ways[-1].name, f"{K} people in one forward", K, bank))
    K = config.people_per_group
    for option, changes in (("channels_last", {"channels_last": True}), ("bfloat16", {"autocast": "bfloat16"})):
        run = finetuner(dataclasses.replace(plain, **changes))
        ways.append(Way(f"bank K={K} {option}", f"bank K={K}", f"{option}, and nothing else", K, run))
    ways.append(
        Way("as configured", f"bank K={K}", "all options of configs/tiny.yaml, A frozen among them", K, finetuner(tune))
    )
    return ways


def measure(ways: list[Way], rounds: int, image_size: int) -> dict[str, float]:
    """Fill `seconds` of each way; returns how far the first person's LoRA is from the plain loop's, in norms of that."""
    people = random_people(max(way.people for way in ways), image_size)
    vectors = {}
    for round_ in range(rounds + 1):  # round 0 warms up
        for way in ways:
            started, cpu_started = time.perf_counter(), time.process_time()
            vectors[way.name] = way.run(people[: way.people])[0]
            if round_ > 0:
                way.cpu_seconds.append((time.process_time() - cpu_started) / way.people)
                way.seconds.append((time.perf_counter() - started) / way.people)
                print(f"round {round_} of {rounds}: {way.name:26s} {way.seconds[-1]:7.3f} s per LoRA", flush=True)
    plain = vectors["plain"]
    return {name: float(np.linalg.norm(vector - plain) / np.linalg.norm(plain)) for name, vector in vectors.items()}


def throughput(args: argparse.Namespace, config: CorpusConfig) -> dict[str, Any]:
    base = BaseModel.from_pretrained(config.base)
    sizes = sorted({4, config.people_per_group} | (set() if args.quick else {32}))
    ways = make_ways(base, config, args.steps, sizes)
    distances = measure(ways, args.rounds, base.image_size)
    named = {way.name: way for way in ways}

    def faster(way: Way, than: Way) -> float:
        """Median over the rounds, each by itself: what was measured side by side is compared side by side."""
        return round(median(slow / fast for slow, fast in zip(than.seconds, way.seconds, strict=True)), 2)

    rows = [
        {
            "way": way.name,
            "seconds_per_lora": round(median(way.seconds), 4),
            "cpu_seconds_per_lora": round(median(way.cpu_seconds), 4),
            "times_plain": faster(way, ways[0]),
            "times_before": faster(way, named[way.against or way.name]),
            "before": way.against,
            "cause": way.cause,
            "distance_to_plain": float(f"{distances[way.name]:.1e}"),
            "rounds": [round(seconds, 4) for seconds in way.seconds],
        }
        for way in ways
    ]
    print(f"\n{'way':26s} s/LoRA  ×plain  ×before  distance  cause")
    for row in rows:
        print(
            "{way:26s} {seconds_per_lora:6.3f} {times_plain:7.2f} {times_before:8.2f} {distance_to_plain:9.0e}  {cause}".format(
                **row
            )
        )
    return {"steps": args.steps, "samples_per_step": 2, "photos_each": PHOTOS, "rows": rows}


def memory(args: argparse.Namespace, config: CorpusConfig) -> dict[str, Any]:
    """Resident memory of a worker of the corpus job, which fine-tunes, draws and scores group after group."""
    process, K = psutil.Process(), config.people_per_group
    maker = LoRAMaker(dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, steps=args.steps)))
    resident = [process.memory_info().rss / 1e6]
    print(f"loaded: {resident[0]:.0f} MB", flush=True)
    for group in range(args.memory):
        people = [
            EmbeddedPerson(
                k,
                person.identity,
                tuple(map(png, person.pixels)),
                face_boxes=person.face_boxes,
                embedding=np.eye(512, dtype="f4")[k % 512],
                photo_embeddings=np.eye(512, dtype="f4")[: len(person.pixels)],
            )
            for k, person in enumerate(random_people(K, maker.base.image_size, seed=group))
        ]
        maker(people)
        resident.append(process.memory_info().rss / 1e6)
        print(f"after {(group + 1) * K:5d} people: {resident[-1]:.0f} MB", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    growth = median(resident[-(args.memory // 2 + 1) :]) - resident[1]  # one group more or less wobbles by some MB
    print(f"peak {peak:.0f} MB; typical of the second half against after the first group: {growth:+.1f} MB")
    return {
        "steps": args.steps,
        "people_per_group": K,
        "resident_mb": [round(mb, 1) for mb in resident],
        "peak_mb": round(peak, 1),
        "growth_mb": round(growth, 1),
    }


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds")
    parser.add_argument("--memory", type=int, metavar="GROUPS", help="watch memory over so many groups instead")
    parser.add_argument("--steps", type=int, help="of each LoRA (30; with --quick or --memory 10)")
    parser.add_argument("--rounds", type=int, help="how often each way is measured (5; with --quick 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="of the JSON (finetune, or finetune_memory)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of configs/tiny.yaml, for example base=path"
    )
    args = parser.parse_args()
    args.steps = args.steps or (10 if args.quick or args.memory else 30)
    args.rounds = args.rounds or (2 if args.quick else 5)
    torch.set_num_threads(args.threads)
    config = load_config(CorpusConfig, ROOT / "configs/tiny.yaml", args.overrides)
    result = memory(args, config) if args.memory else throughput(args, config)
    settings = {key: to_dict(config)[key] for key in ("base", "lora", "finetune", "people_per_group")}
    name = args.name or ("finetune_memory" if args.memory else "finetune")
    print(write_result(name, {"threads": args.threads, "config": settings, **result}))


if __name__ == "__main__":
    main()
