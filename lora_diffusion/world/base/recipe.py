"""The whole way from rendered faces to a ``tiny-sd`` folder: tokenizer, autoencoder, latents, UNet, export.

Each stage leaves its result in the work folder and is skipped when it is there, so the same call goes on where it stopped.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_diffusion.places import Output, Place
from lora_diffusion.storage import open_store
from lora_diffusion.training.distributed import Group
from lora_diffusion.training.loop import Loop, LoopConfig, Report, Stage
from lora_diffusion.world.base import parts
from lora_diffusion.world.base.training import AutoencoderStage, DenoiserStage

CAPTION_VARIANTS = 8


@dataclass(frozen=True)
class BaseRecipe:
    """What ``jobs/world/train_base.py`` does. ``faces``: a folder that ``jobs/world/make_faces.py`` wrote (people of the base split)."""

    faces: Place = "runs/base_faces"
    work: Output = "runs/base"
    out: Output = "runs/base/tiny-sd"
    model: parts.BaseModelConfig = field(default_factory=parts.BaseModelConfig)
    autoencoder: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1250, batch_size=16, learning_rate=2e-3, ema_decay=0.998)
    )
    denoiser: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=16000, batch_size=40, learning_rate=1.5e-3, warmup=200)
    )
    bfloat16: bool = True  # autocast of the denoiser's training; weights and optimiser stay float32
    compile: bool = False  # torch.compile for UNet and text encoder: two minutes at the start, then 1.45 times as fast
    perceptual: Place | None = None  # safetensors of a FaceRecogniser; None: L1 and L2 only


@dataclass(frozen=True)
class TrainBaseConfig:
    """The whole of ``jobs/world/train_base.py``. ``storage``: a folder that all nodes see, or s3://bucket/prefix."""

    recipe: BaseRecipe = field(default_factory=BaseRecipe)
    num_workers: int = 1
    use_gpu: bool = False
    cpus_per_worker: int = 2
    name: str = "tiny-sd"
    storage: Output = "runs/ray"


@dataclass(frozen=True)
class TrainingFaces:
    """images uint8 (M, H, W, 3); captions: ``CAPTION_VARIANTS`` random captions for each."""

    images: np.ndarray
    captions: list[list[str]]


def load_faces(uri: str, size: int, seed: int = 5) -> TrainingFaces:
    """Read what ``jobs/world/make_faces.py`` wrote. Captions are drawn anew from the people and views behind the files."""
    import pyarrow.parquet as pq

    from lora_diffusion.world.people import sample_person, sample_view
    from lora_diffusion.world.people.captions import training_caption

    store = open_store(uri)
    table = pq.read_table(io.BytesIO(store.read("faces.parquet")), columns=["number", "view", "file"])
    rows = sorted(table.to_pylist(), key=lambda row: (row["number"], row["view"]))
    if not rows:
        raise ValueError(
            f"{uri}/faces.parquet has no rows; make faces first: jobs/world/make_faces.py --people 0:3200 --out {uri}"
        )
    rng = np.random.default_rng(seed)
    images, captions = np.empty((len(rows), size, size, 3), np.uint8), []
    for i, data in enumerate(store.read_many([row["file"] for row in rows])):
        images[i] = np.asarray(
            Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        )
        person, view = sample_person(rows[i]["number"]), sample_view(rows[i]["number"], rows[i]["view"])
        captions.append([training_caption(view, person.traits, person.latents, rng) for _ in range(CAPTION_VARIANTS)])
    return TrainingFaces(images, captions)


def perceptual_features(path: str | None) -> Callable[[torch.Tensor], list[torch.Tensor]] | None:
    """The recogniser's feature maps, frozen: a distance that sees faces."""
    if path is None:
        return None
    from safetensors.torch import load_file

    from lora_diffusion.world.recognisers.network import FaceRecogniser

    network = FaceRecogniser()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False).features


@torch.no_grad()
def encode_latents(vae: Any, images: np.ndarray, batch_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every picture's posterior, unscaled, float32 (M, C, h, w) each."""
    device = next(vae.parameters()).device
    means, stds = [], []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images[start : start + batch_size]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)


def train_base(
    recipe: BaseRecipe,
    faces: TrainingFaces,
    group: Group | None = None,
    report: Report = lambda values: None,
) -> Path:
    """Train all stages and write the pipeline folder; returns its path. Worker 0 of the group writes."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTokenizer

    work, config, group = Path(recipe.work), recipe.model, group or Group()
    leader = group.rank == 0
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    if leader and not (work / "tokenizer").exists():
        learned = parts.train_tokenizer((c for variants in faces.captions for c in variants), config)
        learned.save_pretrained(work / "tokenizer.tmp")
        (work / "tokenizer.tmp").rename(work / "tokenizer")
    group.barrier()  # all see the same state of the work folder before anyone changes it again
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")

    vae_folder = work / "vae"
    if not (vae_folder / "config.json").exists():
        vae = parts.new_autoencoder(config).to(group.device)
        features = perceptual_features(recipe.perceptual)
        _train("autoencoder", AutoencoderStage(vae, faces.images, features), recipe.autoencoder, work, group, report)
        means, _ = encode_latents(vae, faces.images[:: max(1, len(faces.images) // 2048)])
        vae.register_to_config(scaling_factor=float(1 / means.std()))
        if leader:
            vae.save_pretrained(work / "vae.tmp")
            (work / "vae.tmp").rename(vae_folder)
    else:
        vae = AutoencoderKL.from_pretrained(vae_folder).to(group.device)
    vae.eval()

    flat = [caption for variants in faces.captions for caption in variants]
    ids = tokenizer(flat, padding="max_length", max_length=config.text_tokens, truncation=True).input_ids
    tokens_MVS = torch.tensor(ids).view(len(faces.images), -1, config.text_tokens)

    unet = parts.new_unet(config).to(group.device)
    text_encoder = parts.new_text_encoder(config, tokenizer).to(group.device)
    if (
        group.device.type == "cpu"
    ):  # PyTorch's fused attention is slower here: sequences are short (1.45 times in bfloat16)
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    if recipe.compile:
        unet.compile()
        text_encoder.compile()
    scheduler = parts.new_scheduler(config)
    means, stds = encode_latents(vae, faces.images)
    scale = vae.config.scaling_factor
    stage = DenoiserStage(unet, text_encoder, scheduler, means * scale, stds * scale, tokens_MVS)
    _train("denoiser", stage, recipe.denoiser, work, group, report, recipe.bfloat16)
    if leader:
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # float16 on disk; the text encoder stays float32, since transformers would load it in the dtype of its file
        # beside a UNet that diffusers loads in float32
        pipe.to("cpu")
        unet.half()
        vae.half()
        pipe.save_pretrained(recipe.out, safe_serialization=True)
    return Path(recipe.out)


def _train(
    name: str, stage: Stage, config: LoopConfig, work: Path, group: Group, report: Report, bfloat16: bool = False
) -> None:
    """Leaves the averaged weights in the modules of `stage`."""
    loop = Loop(name, stage, config, open_store(work), group, bfloat16=bfloat16)
    group.barrier()  # nobody writes a new state while another still reads the old one
    if not loop.state.done:
        loop.run(report)
    stage.load_state_dict(loop.best_weights(), strict=False)
    group.barrier()
