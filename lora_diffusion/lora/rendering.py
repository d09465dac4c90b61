"""Pictures of many different people in one batch: one frozen UNet, one LoRA vector for each person, through the bank.

Axes: B pictures, K people, N length of a LoRA vector, C/H/W latent, S/D text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.models.stable_diffusion import BaseModel

SUBJECT = "sks person"
PROMPT_PARTS = ("expression", "pose", "light", "background", "cloth")  # what a prompt may ask for, scored apart


class PromptScorer(Protocol):
    """Says whether pictures show what their prompts asked for."""

    def hits(self, pictures_THWC: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.int8]:
        """(T, H): 1 shown, 0 not, -1 not asked or not to be told, for each of `PROMPT_PARTS`."""
        ...


def load_prompt_scorer(name: str | None) -> PromptScorer | None:
    """`package.module:Class`, made without arguments. Raises ValueError where there is no such class."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        made: PromptScorer = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"prompt_scorer is {name!r}: {error}; it must be package.module:Class, or null") from error
    return made


def initial_noise(base: BaseModel, seeds: Sequence[int]) -> Tensor:
    """Gaussian latents (B, C, h, w): picture i depends on ``seeds[i]`` alone, never on the batch that it is drawn in."""
    noise = [torch.randn(base.latent_shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(noise).to(base.device)


def make_scheduler(base: BaseModel, name: str = "ddim") -> Any:
    """A deterministic diffusers sampler (``ddim`` or ``dpm``) with the noise schedule of the base model."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    samplers = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
    if name not in samplers:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(samplers)}")
    config = base.scheduler.config
    # DDIM clips its samples to the range of pixels where a config does not say otherwise, and Euler's has no such entry
    latents = {"clip_sample": config.get("clip_sample", False)} if name == "ddim" else {}
    return samplers[name].from_config(config, **latents)


@torch.no_grad()
def render(
    base: BaseModel,
    vectors_KN: Tensor | np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    bank: LoRABank | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    sampler: str = "ddim",
    max_batch: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draw B = ``len(prompts)`` pictures, uint8 RGB (B, H, W, 3).

    ``vectors_KN``: K people, B divisible by K; pictures ``k * B/K ... (k+1) * B/K - 1`` show person k. ``None`` draws with
    the base model alone. A picture is the same alone as in any batch, to float error (its noise comes from its own seed,
    and the sampler is deterministic). ``max_batch`` bounds memory: people are drawn in groups.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list with a prompt for each picture")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each picture")
    if vectors_KN is None:
        spans: list[tuple[int, int, Tensor | None]] = [
            (i, min(i + max_batch, len(prompts)), None) for i in range(0, len(prompts), max_batch)
        ]
    else:
        if bank is None:
            raise ValueError("vectors are given, so a LoRABank of this base model is needed to draw them")
        vectors_KN = torch.as_tensor(np.asarray(vectors_KN) if not isinstance(vectors_KN, Tensor) else vectors_KN)
        if vectors_KN.ndim != 2:
            raise ValueError(f"vectors_KN has shape {tuple(vectors_KN.shape)}: give (K, N), one row for each person")
        people = len(vectors_KN)
        if people == 0 or len(prompts) % people:
            raise ValueError(f"{len(prompts)} pictures cannot be shared evenly by {people} people")
        each = len(prompts) // people
        group = max(1, max_batch // each)
        spans = [
            (k * each, min(k + group, people) * each, vectors_KN[k : k + group].float().to(base.device))
            for k in range(0, people, group)
        ]
    scale = guidance_scale
    pictures = []
    for start, stop, vectors in spans:
        embeddings = base.encode_prompts(list(prompts[start:stop])).to(base.dtype)
        if scale != 1:  # unconditioned and conditioned side by side, so that an identity's samples stay together
            empty = base.encode_prompts([negative_prompt]).to(base.dtype).expand(stop - start, -1, -1)
            embeddings = torch.stack([empty, embeddings], 1).flatten(0, 1)
        scheduler = make_scheduler(base, sampler)
        scheduler.set_timesteps(num_inference_steps)
        latents = initial_noise(base, seeds[start:stop]) * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps):
            x = scheduler.scale_model_input(latents, t).to(base.dtype)
            if scale != 1:
                x = x.repeat_interleave(2, 0)
            conditioning = base.conditioning(embeddings, x)
            if vectors is None:
                output = base.unet(x, t, **conditioning).sample
            else:
                assert bank is not None
                with bank.active(vectors, samples_per_identity=len(x) // len(vectors)):
                    output = base.unet(x, t, **conditioning).sample
            output = output.float()
            if scale != 1:
                unconditioned, conditioned = output[0::2], output[1::2]
                output = unconditioned + scale * (conditioned - unconditioned)
            latents = scheduler.step(output, t, latents).prev_sample
            if on_step is not None:
                on_step(step + 1, num_inference_steps)
        pictures.append(base.decode(latents))
    return np.concatenate(pictures)
