"""Draws many people's pictures in one running batch, which pictures join and leave between two denoising steps.

Each picture has its own LoRA, prompt, seed, guidance, number of steps, and its own place in the noise schedule: the UNet
takes one timestep for each row, and DDIM's step is arithmetic on that row alone. So nobody waits for a batch to end,
nothing has to be grouped by step count, a cancelled picture is gone by the next step, and a picture is the same alone
as in any company (to float error) and as drawn by `lora_diffusion.lora.rendering.render`.

Axes: B rows (pictures in the batch), N length of a LoRA vector, S/D text, C/H/W latent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.rendering import initial_noise, make_scheduler
from lora_diffusion.models.stable_diffusion import BaseModel

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """What to draw. vector_N: the person's LoRA, float32 (N,); lora_scale: of what it adds to the base model."""

    vector_N: NDArray[np.float32]
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float = 3.0
    num_inference_steps: int = 20
    lora_scale: float = 1.0


@dataclass(eq=False)
class Row:
    """A picture in the making: `step` of `len(schedule)` are done."""

    picture: Picture
    schedule: list[tuple[int, float, float]]  # timestep, alpha there, alpha at the next one
    latent_CHW: Tensor
    text_2SD: Tensor  # negative prompt, prompt
    vector_N: Tensor
    step: int = 0
    pixels_HWC: Pixels | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.step == len(self.schedule)


class RenderEngine:
    """The running batch. Not thread-safe: `admit`, `drop` and `advance` are called from one thread."""

    def __init__(self, base: BaseModel, layout: LoRALayout) -> None:
        self.base = base
        self.layout = layout
        self.bank = LoRABank(base.unet, layout)
        self.rows: list[Row] = []
        self._stacked: tuple[Tensor, Tensor] | None = None  # text and vectors; they change only with the rows
        scheduler = make_scheduler(base, "ddim")
        if scheduler.config.thresholding:
            raise ValueError("dynamic thresholding (scheduler.thresholding) is for pixel models; set it to false")
        self._prediction_type: str = scheduler.config.prediction_type
        self._clip: float | None = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self._schedule = lru_cache(maxsize=128)(self._make_schedule)

    def _make_schedule(self, steps: int) -> list[tuple[int, float, float]]:
        scheduler = make_scheduler(self.base, "ddim")
        scheduler.set_timesteps(steps)
        stride = scheduler.config.num_train_timesteps // steps
        alphas = scheduler.alphas_cumprod
        return [
            (t, float(alphas[t]), float(alphas[t - stride] if t >= stride else scheduler.final_alpha_cumprod))
            for t in scheduler.timesteps.tolist()
        ]

    @torch.no_grad()
    def admit(self, pictures: list[Picture]) -> list[Row]:
        """Add the pictures of one request to the batch. Whatever their data makes raise, the batch is as it was."""
        vectors_BN = torch.from_numpy(np.stack([p.vector_N for p in pictures])).float().to(self.base.device)
        for _, B_BOR in self.layout.split(vectors_BN).values():  # views: the product B A scales with B
            B_BOR *= torch.tensor([p.lora_scale for p in pictures], device=B_BOR.device).view(-1, 1, 1)
        prompts = [text for p in pictures for text in (p.negative_prompt, p.prompt)]
        text_BSD = self.base.encode_prompts(prompts).to(self.base.dtype)
        noise = initial_noise(self.base, [p.seed for p in pictures])
        rows = [
            Row(
                picture=picture,
                schedule=self._schedule(picture.num_inference_steps),
                latent_CHW=noise[i],
                text_2SD=text_BSD[2 * i : 2 * i + 2],
                vector_N=vectors_BN[i],
            )
            for i, picture in enumerate(pictures)
        ]
        self.rows += rows
        self._stacked = None
        return rows

    def drop(self, rows: list[Row]) -> None:
        """Take rows out of the batch, finished or not; those that are not in it are passed over."""
        gone = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in gone]
        self._stacked = None

    @torch.no_grad()
    def advance(self, some: list[Row] | None = None) -> list[Row]:
        """One denoising step for all rows, or for some. Those that are finished by it leave the batch, with `pixels_HWC`.

        Where it raises, nothing has changed.
        """
        rows = [row for row in self.rows if some is None or row in some]
        if not rows:
            return []
        if self._stacked is None or some is not None:
            self._stacked = torch.stack([row.text_2SD for row in rows]), torch.stack([row.vector_N for row in rows])
        text_B2SD, vectors_BN = self._stacked
        self._stacked = self._stacked if some is None else None
        guided = any(row.picture.guidance_scale != 1 for row in rows)
        copies = 2 if guided else 1  # unconditioned and conditioned side by side, so that a person's rows stay together
        latents_BCHW = torch.stack([row.latent_CHW for row in rows])
        now = [row.schedule[row.step] for row in rows]
        timesteps_B = torch.tensor([t for t, _, _ in now], device=self.base.device)
        with self.bank.active(vectors_BN, samples_per_identity=copies):
            x = latents_BCHW.to(self.base.dtype).repeat_interleave(copies, 0)
            text_BSD = (text_B2SD if guided else text_B2SD[:, 1:]).flatten(0, 1)
            conditioning = self.base.conditioning(text_BSD, x)
            output = self.base.unet(x, timesteps_B.repeat_interleave(copies, 0), **conditioning).sample.float()
        if guided:
            scale_B = self._column([row.picture.guidance_scale for row in rows])
            unconditioned, conditioned = output[0::2], output[1::2]
            output = unconditioned + scale_B * (conditioned - unconditioned)
        alpha_B, next_alpha_B = self._column([a for _, a, _ in now]), self._column([a for _, _, a in now])
        latents_BCHW = self._ddim(latents_BCHW, output, alpha_B, next_alpha_B)
        ending = [i for i, row in enumerate(rows) if row.step + 1 == len(row.schedule)]
        pictures = self.base.decode(latents_BCHW[ending]) if ending else ()
        for row, latent_CHW in zip(rows, latents_BCHW, strict=True):
            row.latent_CHW = latent_CHW
            row.step += 1
        finished = [rows[i] for i in ending]
        for row, pixels in zip(finished, pictures, strict=True):
            row.pixels_HWC = pixels
        if finished:
            self.drop(finished)
        return finished

    def _ddim(self, x: Tensor, output: Tensor, alpha: Tensor, next_alpha: Tensor) -> Tensor:
        """DDIM with eta = 0 (arXiv:2010.02502, equation 12), as diffusers' DDIMScheduler.step, a row at its own time."""
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        if self._prediction_type == "epsilon":
            sample, noise = (x - s * output) / a, output
        elif self._prediction_type == "v_prediction":
            sample, noise = a * x - s * output, a * output + s * x
        else:
            sample, noise = output, (x - a * output) / s
        if self._clip is not None:
            sample = sample.clamp(-self._clip, self._clip)
        return next_alpha.sqrt() * sample + (1 - next_alpha).sqrt() * noise

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.base.device).view(-1, 1, 1, 1)
