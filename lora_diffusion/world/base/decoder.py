"""The decoder of ``tiny-sd``'s autoencoder, taught to draw sharp pictures from what the UNet leaves soft.

A small UNet's latents lack fine detail, and a decoder that has seen only the encoder's draws them blurred. So it is trained on,
with the encoder, the UNet and all LoRAs as they are, on three kinds of latents: the encoder's; the same noised and denoised again by
the UNet, beside their photo; and drawn from noise, where no photo is the right one. Features of a recogniser and of a discriminator
(hinge loss, as of VQGAN; Esser et al. 2021, arXiv:2012.09841) say what is sharp.

Axes: M photos, B batch, C / H / W latents or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.faces.differentiable import OnnxNetwork
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.lora.rendering import make_scheduler
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.training.loop import Batch, Slots, Stage
from lora_diffusion.world.base.training import NOBODY, feature_distance

STEPS, LATEST = 10, 7  # of the sampler; a photo's latent is noised to one of its steps up to LATEST, and denoised again
HALVED = "/AveragePool_output_0"  # in the bundled recognisers' graphs: a crop of 56 pixels
MAPS = ("/stage1/stage1.0/Relu_1_output_0", "/stage2/stage2.1/Relu_1_output_0", "/stage3/stage3.1/Relu_1_output_0")


@dataclass(frozen=True)
class DecoderWeights:
    """What the decoder's losses weigh.

    photo: L1 to the photo. features: distance in the recogniser's feature maps. matching: the same in the discriminator's.
    adversarial: how real the discriminator finds a picture. colour: L1 to the decoder of before where there is no photo.
    """

    photo: float = 0.5
    features: float = 0.5
    matching: float = 1.0
    adversarial: float = 0.05
    colour: float = 1.0


class DecoderStage(Stage):
    """Trains `vae.decoder` and `vae.post_quant_conv`, and a discriminator beside them.

    images_MHWC: uint8. clean, softened, drawn: latents (M, C, H, W) as the UNet sees them.
    """

    def __init__(
        self,
        vae: Any,
        images_MHWC: np.ndarray,
        latents: dict[str, Tensor],
        features: Callable[[Tensor], list[Tensor]],
        weights: DecoderWeights | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder.requires_grad_(True), vae.post_quant_conv.requires_grad_(True)
        self.discriminator = Discriminator()
        self.images_MHWC, self.latents, self.scale = images_MHWC, latents, vae.config.scaling_factor
        self.features, self.weights = features, weights or DecoderWeights()
        self.train_slots, self.validation_slots = np.arange(len(images_MHWC)), NOBODY
        with torch.no_grad():
            self.before = torch.cat([self._decode(part).half() for part in latents["drawn"].split(64)])

    def inputs(self, slots: Slots) -> Batch:
        at = torch.from_numpy(slots)
        rows = {name: values[at].float() for name, values in {**self.latents, "before": self.before}.items()}
        return {"images": torch.from_numpy(self.images_MHWC[slots]), **rows}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        return {}

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Each photo is one row: its latent, its latent softened, and a drawn one."""
        w, B = self.weights, len(inputs["images"])
        photos = inputs["images"].permute(0, 3, 1, 2) / 127.5 - 1
        pictures = self._decode(torch.cat([inputs["clean"], inputs["softened"], inputs["drawn"]]))
        paired, drawn, photos_twice = pictures[: 2 * B], pictures[2 * B :], torch.cat([photos, photos])
        real, real_maps = self.discriminator(photos)
        said, maps = self.discriminator(pictures, frozen=True)
        told, _ = self.discriminator(pictures.detach())
        parts = {
            "photo": _by_row((paired - photos_twice).abs(), B),
            "features": feature_distance(self.features, paired, photos_twice).view(2, B).mean(0),
            "matching": torch.stack(
                [
                    _by_row((a[: 2 * B] - b.detach().repeat(2, 1, 1, 1)).abs(), B)
                    for a, b in zip(maps, real_maps, strict=True)
                ]
            ).mean(0),
            "adversarial": -_by_row(said, B),
            "colour": _by_row((drawn - inputs["before"]).abs(), B),
        }
        loss_B = torch.stack([value * parts[name] for name, value in vars(w).items()]).sum(0)
        parts["discriminator"] = _by_row(F.relu(1 - real), B) + _by_row(F.relu(1 + told), B)
        return loss_B + parts["discriminator"], {name: part.detach() for name, part in parts.items()}

    def _decode(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(self.post_quant_conv(latents.float() / self.scale))
        return pictures


class Discriminator(nn.Module):
    """Real or drawn, for each patch of 22 pixels. Spectral norms are exact: no state beside the weights."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        sizes = [
            (3, w, 3, 1),
            (w, w, 4, 2),
            (w, 2 * w, 3, 1),
            (2 * w, 2 * w, 4, 2),
            (2 * w, 4 * w, 3, 1),
            (4 * w, 1, 3, 1),
        ]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, kernel, stride, 1) for i, o, kernel, stride in sizes)

    def forward(self, pictures_BCHW: Tensor, frozen: bool = False) -> tuple[Tensor, list[Tensor]]:
        """How real each patch is, and the feature maps. frozen: no gradient for the weights."""
        x, maps = pictures_BCHW, list[Tensor]()
        for layer in self.layers:
            if maps:
                x = F.leaky_relu(x, 0.2)
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            weight, bias = (p.detach() if frozen else p for p in (layer.weight, layer.bias))
            weight = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
            x = F.conv2d(x, weight, bias, stride=layer.stride[0], padding=1)
            maps.append(x)
        return x, maps[:-1]


def recogniser_features(name: str = "tiny") -> Callable[[Tensor], list[Tensor]]:
    """Feature maps of a bundled recogniser at strides 2, 4 and 8, for pictures in -1 .. 1 that it need not align."""
    network = OnnxNetwork(FaceEmbedder(EmbedderConfig(name)).recogniser.model_file)
    return lambda pictures: network.between({HALVED: pictures}, MAPS)


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Mean of all that belongs to a row, where pictures are stacked in groups of `rows`."""
    return values.flatten(1).mean(1).view(-1, rows).mean(0)


@torch.no_grad()
def latents_for_decoder(
    base: BaseModel, images_MHWC: np.ndarray, captions: list[str], seed: int = 0, batch_size: int = 64
) -> dict[str, Tensor]:
    """`clean`, `softened` and `drawn` latents of photos, (M, C, H, W) float16 each, with their captions as prompts."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    made: dict[str, list[Tensor]] = {"clean": [], "softened": [], "drawn": []}
    for begin in range(0, len(images_MHWC), batch_size):
        span = slice(begin, begin + batch_size)
        prompts, clean = base.encode_prompts(captions[span]), base.encode_images(images_MHWC[span])
        made["clean"].append(clean.half())
        for name, first in (("softened", int(rng.integers(STEPS // 3, LATEST + 1))), ("drawn", 0)):
            noise = torch.randn(clean.shape, generator=generator).to(base.device)
            made[name].append(_denoised(base, clean, noise, prompts, first).half())
    return {name: torch.cat(parts).cpu().contiguous() for name, parts in made.items()}


def _denoised(base: BaseModel, clean: Tensor, noise: Tensor, prompts: Tensor, first: int) -> Tensor:
    """From the sampler's step `first`, where `clean` is noised accordingly; at step 0 nothing is left of it."""
    scheduler = make_scheduler(base, "ddim")
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps[first:]
    x = noise * scheduler.init_noise_sigma if first == 0 else scheduler.add_noise(clean, noise, timesteps[:1])
    for t in timesteps:
        with torch.autocast(base.device.type, torch.bfloat16):
            out = base.unet(x, t, **base.conditioning(prompts, x)).sample.float()
        x = scheduler.step(out, t, x).prev_sample
    return x
