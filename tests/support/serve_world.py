"""A synthesiser with random weights for the shipped base model: the laws of the endpoint do not depend on training."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import PCACodes
from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA
from lora_diffusion.synthesis.synthesizer import Neighbours, Provenance, Synthesizer

CODE_SIZE = 16


@functools.cache
def base_model() -> BaseModel:
    return BaseModel.from_pretrained("tiny-sd")


@functools.cache
def recogniser_id(name: str) -> dict[str, str]:
    return {"name": name, "fingerprint": FaceEmbedder(EmbedderConfig(model=name)).fingerprint}


def random_synthesizer(layout: LoRALayout, fingerprint: str, seed: int = 0, recogniser: str = "tiny") -> Synthesizer:
    """Codes of 16 numbers, LoRAs that change pictures visibly, two attributes, eight people of a corpus."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    normaliser = Normaliser(0.02 * draw(layout.size), 0.02 + 0.02 * torch.rand(layout.size, generator=generator))
    components_KM = torch.linalg.qr(draw(normaliser.size, CODE_SIZE)).Q.T.contiguous()
    pca = PCA(
        torch.zeros(normaliser.size),
        components_KM,
        torch.full((CODE_SIZE,), normaliser.size / CODE_SIZE),
        torch.tensor(float(normaliser.size)),
    )
    codes = PCACodes(normaliser, pca)
    codes.scale_Z.fill_((normaliser.size / CODE_SIZE) ** 0.5)
    torch.manual_seed(seed)
    denoiser = Denoiser(CODE_SIZE, 512, DenoiserConfig(width=32, depth=1))
    with torch.no_grad():
        for parameter in denoiser.parameters():  # an untrained one ignores the face: its last layers are zero
            parameter.add_(0.05 * draw(*parameter.shape))
    directions = AttributeDirections(("smile", "age"), torch.eye(2, CODE_SIZE), torch.ones(2), torch.ones(2))
    embeddings_PC = torch.nn.functional.normalize(draw(8, 512), dim=1)
    return Synthesizer(
        layout,
        codes,
        denoiser,
        Diffusion(DiffusionConfig()),
        Provenance(base={"name": "tiny-sd", "fingerprint": fingerprint}, recogniser=recogniser_id(recogniser)),
        directions,
        Neighbours(embeddings_PC, draw(8, CODE_SIZE)),
    )


def save_synthesizer(folder: Path, seed: int = 0, recogniser: str = "tiny") -> Path:
    base = base_model()
    random_synthesizer(LoRALayout.from_unet(base.unet), base.fingerprint, seed, recogniser).save_pretrained(folder)
    return folder
