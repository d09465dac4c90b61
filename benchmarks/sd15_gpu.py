"""Fine-tuning, drawing and synthesising at the true size of Stable Diffusion 1.5, on one GPU, with random weights.

    python benchmarks/sd15_gpu.py                            # sized for 80 s on an H100
    python benchmarks/sd15_gpu.py --only render --seconds 40
    python benchmarks/sd15_gpu.py --tiny                     # on CPUs, a small model: does the script run?

Speed does not depend on the weights, so none are needed, and no text encoder: prompts become random embeddings.
finetune    the corpus job's `Finetuner`, K people together, against peft and AdamW, one person after the other. Seconds of
            a step are the difference of a long and a short run: neither set-up nor the encoding of photos is in them.
render      16 people in one running batch against diffusers' `load_lora_weights`, draw, `unload_lora_weights`, each alone.
synthesize  one embedding, and 64, to LoRA vectors, with the networks of configs/train_sd15.yaml.
memory      what one more LoRA takes on the GPU.
Ways take turns (A B C A B C ...), medians are shown. Writes benchmarks/results/sd15_gpu.json after each section.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

from lora_diffusion import synthesis as s
from lora_diffusion.config import from_dict
from lora_diffusion.lora import formats
from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule, RandomStreams, TimestepSampler
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.lora.rendering import initial_noise, render
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.serving.engine import Picture, RenderEngine

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CORPUS, TRAINING = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("sd15.yaml", "train_sd15.yaml"))
PHOTOS, SHORT, LONG = 4, 2, 8  # photos of each person, and class images; steps of fine-tuning
PEOPLE, STEPS, GUIDANCE, PROMPT = 16, 20, 7.5, "a photo of sks person"
ALONE = 4  # so many people are drawn one after the other in a round
Way = Callable[[int], Any]  # does so many steps


@dataclasses.dataclass
class RandomBase(BaseModel):
    """SD 1.5 without a text encoder. Embeddings are random, and the same for the same prompt."""

    texts: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        for prompt in set(prompts) - set(self.texts):
            text_SD = torch.randn(77, self.unet.config.cross_attention_dim)
            self.texts[prompt] = text_SD.to(self.device)
        return torch.stack([self.texts[prompt] for prompt in prompts])


def make_base(device: str, dtype: torch.dtype, tiny: bool) -> RandomBase:
    channels, vae_channels = ((32, 64, 64, 64), (32,) * 4) if tiny else ((320, 640, 1280, 1280), (128, 256, 512, 512))
    size, width = (8, 32) if tiny else (64, 768)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        sizes: dict[str, Any] = {"cross_attention_dim": width, "norm_num_groups": 8 if tiny else 32}
        unet = diffusers.UNet2DConditionModel(size, block_out_channels=channels, **sizes)
        vae = diffusers.AutoencoderKL(block_out_channels=vae_channels, sample_size=8 * size, **blocks)
    torch.set_default_dtype(torch.float32)
    schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    for part in (unet, vae):
        part.eval().requires_grad_(False)
    return RandomBase(unet, vae, None, None, scheduler)


class PlainLoop:
    """weights2weights' recipe: DreamBooth by peft and torch.optim.AdamW. As favours to it, latents and text are given.

    `favoured`: two more, convolutions in channels last, and the LoRA in the base's dtype, which spares casts.
    """

    def __init__(self, base: BaseModel, layout: LoRALayout, config: FinetuneConfig, favoured: bool) -> None:
        self.base, self.layout, self.config = base, layout, config
        lora = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=list(layout.target_modules))
        self.unet = peft.inject_adapter_in_model(lora, copy.deepcopy(base.unet))
        self.unet.to(memory_format=torch.channels_last if favoured else torch.preserve_format)
        modules = [self.unet.get_submodule(entry.name) for entry in layout.entries]
        self.lora = [getattr(m, part)["default"].weight for m in modules for part in ("lora_A", "lora_B")]
        for weight in self.lora:
            weight.data = weight.data.to(base.dtype if favoured else torch.float32)
        self.x0_2CHW = torch.randn(2, *base.latent_shape, device=base.device)
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler, base.device)

    def __call__(self, steps: int) -> Tensor:
        c, base = self.config, self.base
        start = self.layout.split(initial_vectors(self.layout, c.seed))
        for weight, matrix in zip(self.lora, (m for pair in start.values() for m in pair), strict=True):
            weight.data.copy_(matrix[0])
        optimizer = torch.optim.AdamW(
            self.lora, lr=c.learning_rate, betas=c.betas, eps=c.epsilon, weight_decay=c.weight_decay
        )
        streams, sample = RandomStreams(["0"], c.seed, True), TimestepSampler(0, len(self.schedule), "uniform")
        text_2SD = base.encode_prompts([c.instance_prompt, c.class_prompt]).to(base.dtype)
        for _ in range(steps):
            draws = streams.draw(base.latent_shape, (1, 1), sample)
            timesteps, noise = (draw[0].to(base.device) for draw in draws)
            x_t, target = self.schedule.add_noise(self.x0_2CHW, noise, timesteps)
            answer = self.unet(x_t.to(base.dtype), timesteps, encoder_hidden_states=text_2SD).sample.float()
            loss = F.mse_loss(answer[:1], target[:1]) + c.prior_weight * F.mse_loss(answer[1:], target[1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.lora, c.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([weight.detach().flatten() for weight in self.lora])


def timed(run: Callable[..., Any], *args: Any) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    run(*args)
    wait()
    return time.perf_counter() - begin


def allocated() -> int:
    """Bytes on the GPU now; the peak is counted from here."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def race(
    ways: dict[str, Way], warm_steps: int, measure: Callable[[Way], float], seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds that `measure` says of each way, one for each round, and GB that each needs beside what lies there.

    A way that runs out of memory in its warm-up is left out.
    """
    found: dict[str, list[float]] = {}
    working_gb: dict[str, float] = {}
    for name, way in ways.items():
        before = allocated()
        try:
            timed(way, warm_steps)
            found[name] = []
        except torch.OutOfMemoryError as error:
            print(f"  {name}: {error}", flush=True)
        if torch.cuda.is_available():
            working_gb[name] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
        print(f"  warmed up {name}, {working_gb.get(name)} GB", flush=True)
    end, last = time.perf_counter() + seconds, 0.0
    while last == 0 or time.perf_counter() + last < end:
        begin = time.perf_counter()
        for name, values in found.items():
            values.append(measure(ways[name]))
            print(f"  {name}: {values[-1]:.5f} s", flush=True)
        last = time.perf_counter() - begin
    return found, working_gb


def finetune(base: RandomBase, layout: LoRALayout, seconds: float) -> dict[str, Any]:
    config = from_dict(FinetuneConfig, CORPUS["finetune"])
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTOS, base.image_size, base.image_size, 3), np.uint8)
    plain, favoured = (PlainLoop(base, layout, config, f) for f in (False, True))  # before a Finetuner changes strides
    tuner = Finetuner(base, layout, config, pixels)

    def together(people: list[PersonPhotos], steps: int) -> np.ndarray:
        tuner.config = dataclasses.replace(config, steps=steps)
        return tuner(people).vectors_KN

    def step(way: Way) -> float:
        return (timed(way, LONG) - timed(way, SHORT)) / (LONG - SHORT)

    everybody = [PersonPhotos(str(k), pixels) for k in range(16)]
    sizes = {f"K={K}": K for K in sorted({1, 4, CORPUS["people_per_group"], 16})}
    ways: dict[str, Way] = {"plain": plain, "plain favoured": favoured}
    ways |= {name: partial(together, everybody[:K]) for name, K in sizes.items()}
    # One step from the same photo: both must move alike, up to the rounding of the base. With so large an epsilon AdamW
    # follows the gradient, and not the signs of its rounding.
    tuner.config = plain.config = dataclasses.replace(config, epsilon=1.0, steps=1)
    plain.x0_2CHW = tuner.class_latents[:1].repeat(2, 1, 1, 1)  # type: ignore[index]
    vectors = plain(1), torch.from_numpy(tuner([PersonPhotos("0", pixels[:1])]).vectors_KN[0])
    moved_2N = torch.stack([vector_N.cpu() for vector_N in vectors]) - initial_vectors(layout, config.seed)
    cosine = round(float(F.cosine_similarity(moved_2N[0], moved_2N[1], dim=0)), 4)
    plain.config = config
    print(f"  cosine of the plain loop's first step and ours: {cosine}", flush=True)
    found, working_gb = race(ways, SHORT, step, seconds)
    rows: list[dict[str, Any]] = []
    for name in ways:
        K, values = sizes.get(name, 1), found.get(name)
        row: dict[str, Any] = {"way": name, "people": K, "working_gb": working_gb.get(name)}
        if values:
            row |= {
                "step_s": round(median(values), 5),
                "seconds_per_lora_step": round(median(values) / K, 5),
                "loras_per_hour": round(3600 * K / (median(values) * config.steps), 1),
                "times_plain": round(median(K * a / b for a, b in zip(found["plain"], values, strict=True)), 2),
                "rounds": [round(value, 5) for value in values],
            }
        rows.append(row if values else row | {"error": "out of memory"})
        print(" ", rows[-1], flush=True)
    samples = config.batch_size + config.prior_batch_size
    about = {"steps_of_a_lora": config.steps, "samples_per_person_and_step": samples}
    return {**about, "cosine_of_first_step_to_plain": cosine, "rows": rows}


def draw(base: RandomBase, layout: LoRALayout, seconds: float) -> dict[str, Any]:
    base.unet.to(memory_format=torch.contiguous_format)  # as served; fine-tuning may have changed it
    vectors_KN = 0.02 * np.random.default_rng(0).standard_normal((PEOPLE, layout.size), np.float32)
    engine, seeds = RenderEngine(base, layout), list(range(PEOPLE))
    loading: list[float] = []
    parts: dict[str, Any] = {"unet": copy.deepcopy(base.unet), "scheduler": copy.deepcopy(base.scheduler)}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(vae=base.vae, **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    nothing_1SD, text_1SD = base.encode_prompts(["", PROMPT]).to(base.dtype).split(1)

    def bank(steps: int) -> np.ndarray:
        people = zip(vectors_KN, seeds, strict=True)
        rows = engine.admit([Picture(vector, PROMPT, "", seed, GUIDANCE, steps) for vector, seed in people])
        while engine.rows:
            engine.advance()
        return np.stack([row.pixels_HWC for row in rows if row.pixels_HWC is not None])

    def same_person(steps: int) -> np.ndarray:
        how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "bank": engine.bank}
        return render(base, vectors_KN[:1], [PROMPT] * PEOPLE, seeds, **how)

    def one_by_one(steps: int) -> np.ndarray:
        pictures, text = [], {"prompt_embeds": text_1SD, "negative_prompt_embeds": nothing_1SD}
        for seed in seeds[:ALONE]:
            seconds = timed(pipe.load_lora_weights, f"{folder}/{seed}.safetensors")
            noise = initial_noise(base, [seed]).to(base.dtype)
            how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "np"}
            pictures.append(pipe(**text, latents=noise, **how).images[0])
            loading.append(seconds + timed(pipe.unload_lora_weights))
        return (np.stack(pictures) * 255).round()

    with tempfile.TemporaryDirectory() as folder:
        for k, vector_N in enumerate(vectors_KN):
            formats.save(vector_N, layout, f"{folder}/{k}.safetensors")
        gap = round(float(np.abs(bank(5)[:ALONE] - one_by_one(5)).mean()), 3)
        print(f"  mean difference of the pictures, grey levels: {gap}", flush=True)
        ways: dict[str, Way] = {"bank": bank, "one_by_one": one_by_one, "same_person": same_person}
        found, working_gb = race(ways, 2, lambda way: timed(way, STEPS), seconds)
    counts = {"bank": PEOPLE, "one_by_one": ALONE, "same_person": PEOPLE}
    result: dict[str, Any] = {
        **{"people": PEOPLE, "steps": STEPS, "guidance_scale": GUIDANCE, "pixels": base.image_size},
        "vae_decoding": "included",
        "images_per_second": {name: round(counts[name] / median(values), 3) for name, values in found.items()},
        "load_and_unload_s": round(median(loading[2 * ALONE :]), 4),
        "mean_difference_of_pictures_in_grey_levels": gap,
        "working_gb": working_gb,
        "rounds_s": {name: [round(value, 3) for value in values] for name, values in found.items()},
    }
    speed = result["images_per_second"]
    result["bank_against_one_by_one"] = round(speed["bank"] / speed["one_by_one"], 2)
    result["cost_of_different_people"] = round(speed["same_person"] / speed["bank"] - 1, 4)
    return result


def synthesize(base: RandomBase, layout: LoRALayout, seconds: float) -> dict[str, Any]:
    tiny = base.image_size < 512
    vae_config = from_dict(s.VAEConfig, {"latent_size": 16, "hidden": [64, 32]} if tiny else TRAINING["vae"])
    denoiser_config = from_dict(s.DenoiserConfig, {"width": 32, "depth": 2} if tiny else TRAINING["denoiser"])
    with base.device:
        vae = s.LoRAVAE(vae_config, s.Normaliser(torch.zeros(layout.size), torch.ones(layout.size)))
    codes, diffusion = s.LatentCodes(vae), s.Diffusion(s.DiffusionConfig())
    denoiser = diffusion.denoiser(codes.size, 512, denoiser_config)
    synthesizer = s.Synthesizer(layout, codes, denoiser, diffusion).to(base.device)
    faces_BC = np.random.default_rng(0).standard_normal((64, 512), np.float32)

    def together(batch: int, guidance: float, seed: int) -> np.ndarray:
        return synthesizer.from_embedding(faces_BC[:batch], seed=seed, guidance_scale=guidance)

    kinds = [(batch, guidance) for guidance in (1.0, 2.0) for batch in (1, 64)]
    ways: dict[str, Way] = {}
    ways |= {f"{batch} faces, guidance {guidance:g}": partial(together, batch, guidance) for batch, guidance in kinds}
    found, working_gb = race(ways, 1, lambda way: median(timed(way, seed) for seed in range(5)), seconds)
    return {
        "vector_size": layout.size,
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "denoiser_parameters": sum(p.numel() for p in denoiser.parameters()),
        "num_inference_steps": synthesizer.latent_sampling.num_inference_steps,
        "milliseconds": {name: round(1000 * median(values), 2) for name, values in found.items()},
        "working_gb": working_gb,
    }


def memory(base: RandomBase, layout: LoRALayout, seconds: float) -> dict[str, Any]:
    before, count = allocated(), 10_000
    vectors_KN = torch.zeros(count, layout.size, device=base.device)
    grown = torch.cuda.memory_allocated() - before if torch.cuda.is_available() else vectors_KN.nbytes
    return {"loras": count, "bytes_each": round(grown / count, 1), "4N": 4 * layout.size, "gb": round(grown / 1e9, 3)}


SECTIONS: dict[str, tuple[Callable[[RandomBase, LoRALayout, float], dict[str, Any]], float]] = {
    "finetune": (finetune, 25),  # seconds of its rounds
    "render": (draw, 12),
    "synthesize": (synthesize, 4),
    "memory": (memory, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, help="of each section's rounds (finetune 25, render 12, synthesize 4)")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on CPUs, no result is written without --name"
    )
    parser.add_argument("--dtype", help="of the base model (as configured; with --tiny float32)")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--name", help="of the JSON (sd15_gpu)")
    args = parser.parse_args()
    device, name = ("cpu", args.name) if args.tiny else ("cuda", args.name or "sd15_gpu")
    dtype, lora = args.dtype or ("float32" if args.tiny else CORPUS["dtype"]), CORPUS["lora"]
    diffusers.utils.logging.set_verbosity_error()  # one_by_one would warn of each LoRA that has no text encoder's part
    begin = time.perf_counter()
    base = make_base(device, getattr(torch, dtype), args.tiny)
    layout = LoRALayout.from_unet(base.unet, lora["rank"], lora["target_modules"], lora["alpha"])
    result: dict[str, Any] = {
        "device": "cpu" if args.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "base": f"{'tiny' if args.tiny else 'the size of SD 1.5'}, {dtype}, random weights",
        "vector_size": layout.size,
        "building_s": round(time.perf_counter() - begin, 1),
        **({"commit": args.commit} if args.commit else {}),
    }
    print(result, flush=True)
    for section in args.only:
        (run, seconds), begin = SECTIONS[section], time.perf_counter()
        try:
            result[section] = run(base, layout, seconds if args.seconds is None else args.seconds)
        except Exception as error:
            traceback.print_exc()
            result[section] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{section} ({time.perf_counter() - begin:.1f} s): {result[section]}", flush=True)
        if name:
            print(write_result(name, result), flush=True)


if __name__ == "__main__":
    main()
