"""The frozen Stable Diffusion that every LoRA belongs to: loaded once for each process, shared by fine-tuning and rendering.

`BaseModel` is what callers see of every family. Here are 1.x and 2.x; what another does otherwise is in a file of its own.

Axes: B batch, C latent channels, H/W pixels or latent cells, S token positions, D width of the text encoder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_diffusion.models import stable_diffusion_xl
from lora_diffusion.models.clip_tokenizer import tokens
from lora_diffusion.models.devices import resolve_device
from lora_diffusion.models.files import fetch_folder
from lora_diffusion.models.fingerprint import DIGITS, EARLIER, EXACT, model_fingerprint, old_fingerprints
from lora_diffusion.models.loading import EXPECTED, load_parts
from lora_diffusion.models.parts import is_xl, networks_of, overflows_in_half
from lora_diffusion.places import place_or_name

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = {"tiny-sd": ASSETS / "tiny-sd"}
FEW_TOKENS = 10_000  # a tokenizer of fewer knows single words, no language


def resolve_model(name_or_path: str) -> str:
    """A shipped model's folder by its short name (``tiny-sd``), or a local copy of ``s3://bucket/prefix``.

    Anything else is a path or a hub id and stays as it is. Raises ``ValueError`` if a bucket gives nothing.
    """
    name = place_or_name(name_or_path)
    return str(fetch_folder(name) if name.startswith("s3://") else EMBEDDED.get(name, name))


@dataclass(repr=False)
class BaseModel:
    """The parts of a ``StableDiffusionPipeline`` or a ``StableDiffusionXLPipeline``, frozen, on one device.

    Each part runs in its own dtype, mostly that of the UNet; callers get float32 latents and embeddings.
    exact_fingerprint: taken before the weights were rounded to bfloat16; "": they were not.
    force_zeros_for_empty_prompt: of XL; the empty prompt is all zeros, as in training. Stability's own model says so.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    name: str = ""
    exact_fingerprint: str = ""
    text_encoder_2: Any = None  # of XL
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool = True

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> BaseModel:
        """Load a shipped model (``tiny-sd``), a diffusers folder or a single file, here or in a bucket, or a model of the hub.

        Raises ``ValueError`` that says what lies there, what was expected and the way out, or that `device` is not there.
        """
        device = resolve_device(device)
        try:
            name = place_or_name(name_or_path)
            parts = load_parts(str(EMBEDDED.get(name, name)), dtype if dtype in EXACT else torch.float32)
        except ValueError as error:
            raise ValueError(
                f"cannot load a base model from {str(name_or_path)!r}: {error}; {EXPECTED} ({', '.join(EMBEDDED)})"
            ) from error
        if dtype in EXACT:
            return cls.from_pipeline(parts, device, str(name_or_path))
        networks = networks_of(parts)
        fingerprint = model_fingerprint(networks, parts.scheduler)
        for part, network in networks.items():
            if part != "vae" or not overflows_in_half(parts):
                nn.Module.to(network, dtype)  # diffusers warns of its own `to`
        base = cls.from_pipeline(parts, device, str(name_or_path))
        base.exact_fingerprint = fingerprint
        return base

    @classmethod
    def from_pipeline(cls, pipe: Any, device: str | torch.device = "cpu", name: str = "") -> BaseModel:
        """Take the parts of a loaded pipeline (or `Parts`) and freeze them (``eval``, no gradients). The family is told by them."""
        device = resolve_device(device)
        for network in networks_of(pipe).values():
            network.to(device).eval().requires_grad_(False)
        base = cls(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, name)
        if is_xl(pipe):
            base.text_encoder_2, base.tokenizer_2 = pipe.text_encoder_2, pipe.tokenizer_2
            base.force_zeros_for_empty_prompt = bool(getattr(pipe, "config", pipe).force_zeros_for_empty_prompt)
        if overflows_in_half(pipe):
            nn.Module.float(pipe.vae)
        return base

    def __repr__(self) -> str:
        return f"BaseModel({self.name!r}, {self.image_size} px, {self.dtype}, device={str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def pixels_per_cell(self) -> int:
        """Side of a latent cell, pixels."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def image_size(self) -> int:
        """Side of the square pictures that this model draws, pixels."""
        return int(self.unet.config.sample_size) * self.pixels_per_cell

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), size, size

    @cached_property
    def fingerprint(self) -> str:
        """20 hex digits: what a LoRA was trained against, in whatever dtype and on whatever device (`models/fingerprint.py`).

        A pipeline that somebody else loaded in bfloat16 has lost digits: it has a fingerprint of its own.
        """
        return self.exact_fingerprint or model_fingerprint(networks_of(self), self.scheduler)

    def knows(self, fingerprint: str) -> bool:
        """Whether `fingerprint` is this model's, or what an earlier release called it in some dtype.

        That release hashed the weights as they were loaded, so a corpus in bfloat16 is only recognised by loading the model
        once more, from `name`, and rounding it as it did. For artifacts of today none of this is done.
        """
        if len(fingerprint) == DIGITS:
            return fingerprint in (self.fingerprint, *EARLIER.get(self.fingerprint, ()))
        return bool(fingerprint) and fingerprint in self._old_fingerprints()

    def _old_fingerprints(self) -> Iterator[str]:
        yield from EARLIER.get(self.fingerprint, ())
        yield from old_fingerprints(networks_of(self), self.scheduler, [self.dtype])
        try:
            exact = self if self.dtype == torch.float32 else BaseModel.from_pretrained(self.name)
        except ValueError:
            return
        others = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if dtype != self.dtype]
        yield from old_fingerprints(networks_of(exact), exact.scheduler, others)

    @torch.no_grad()
    def encode_images(self, pixels: np.ndarray | Tensor, batch_size: int = 32) -> Tensor:
        """uint8 RGB (B, H, W, 3) -> scaled latents (B, C, H/8, W/8), the mean of the VAE's posterior, float32.

        The mean and not a sample: a photo then gives the same latent however it is batched, and is encoded once.
        """
        images = torch.as_tensor(np.asarray(pixels))
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pictures (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        parts = []
        for chunk in images.split(batch_size):
            x = chunk.permute(0, 3, 1, 2).to(self.device, self.vae.dtype) / 127.5 - 1
            parts.append(self.vae.encode(x).latent_dist.mean.float() * self.vae.config.scaling_factor)
        return torch.cat(parts)

    def pictures(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> RGB (B, 3, H, W), float32, -1 to 1 and somewhat beyond; with gradient."""
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        pictures: Tensor = self.vae.decode(scaled).sample.float()
        return pictures

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 32) -> np.ndarray:
        """Scaled latents (B, C, h, w) -> uint8 RGB (B, H, W, 3)."""
        parts = []
        for chunk in latents.split(batch_size):
            parts.append(
                ((self.pictures(chunk) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
            )
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts -> text embeddings (B, S, D), float32. Each distinct prompt is encoded once.

        One tensor, whatever the family: callers copy, mix and keep it row by row, and give it to `conditioning`.
        """
        distinct = sorted(set(prompts))
        parts = [self._encode(distinct[i : i + 64]) for i in range(0, len(distinct), 64)]
        embeddings = torch.cat(parts)
        return embeddings[[distinct.index(prompt) for prompt in prompts]]

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is longer than what the text encoder reads; "" of one that is read whole."""
        words = prompt.split()

        def length(count: int) -> int:
            return len(self.tokenizer(" ".join(words[:count]), truncation=False).input_ids)

        read = bisect_right(range(len(words) + 1), self.tokenizer.model_max_length, key=length) - 1
        return " ".join(words[read:])

    def _encode(self, texts: list[str]) -> Tensor:
        if is_xl(self):
            return stable_diffusion_xl.encode(self, texts)
        embeddings: Tensor = self.text_encoder(tokens(self.tokenizer, texts).to(self.device))[0].float()
        return embeddings

    def conditioning(self, text_BSD: Tensor, latents_BCHW: Tensor) -> dict[str, Any]:
        """What the UNet is told beside noisy latents and their time, as its keyword arguments."""
        if is_xl(self):
            return stable_diffusion_xl.conditioning(self, text_BSD, latents_BCHW)
        return {"encoder_hidden_states": text_BSD}

    @property
    def words(self) -> list[str] | None:
        """The words that a prompt can be made of, where the model learnt few; None: its tokenizer knows a language."""
        if len(self.tokenizer) > FEW_TOKENS:
            return None
        known = (token.removesuffix("</w>") for token in self.tokenizer.get_vocab() if token.endswith("</w>"))
        return sorted(token for token in known if token.isascii() and token.isalpha())


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
