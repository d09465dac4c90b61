"""Sharpening `tiny-sd`'s decoder: the encoder, the UNet and every LoRA stay; what is soft gets nearer to its photo."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.world import sharpen_decoder
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.training.loop import LoopConfig
from lora_diffusion.world.base.decoder import DecoderStage, Discriminator, latents_for_decoder, recogniser_features
from lora_diffusion.world.people import render as photograph
from lora_diffusion.world.people import sample_person, sample_view
from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter


def test_softened_latents_lie_between_the_photo_and_noise() -> None:
    base = BaseModel.from_pretrained("tiny-sd")
    photos = np.stack([photograph(sample_person(n), sample_view(n, 0)).image for n in range(4)])
    latents = latents_for_decoder(base, photos, ["a photo of sks person"] * 4)
    apart = {name: (latents[name].float() - latents["clean"].float()).square().mean() for name in latents}
    assert apart["clean"] == 0 < 2 * apart["softened"] < apart["drawn"]
    assert torch.allclose(latents["clean"].float(), base.encode_images(photos), atol=2e-3)


def test_a_frozen_discriminator_passes_gradients_to_pictures_alone() -> None:
    discriminator, pictures = Discriminator(), torch.rand(2, 3, 64, 64, requires_grad=True)
    discriminator(pictures, frozen=True)[0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    says, maps = discriminator(100 * pictures)
    assert says.abs().max() <= 100 * pictures.detach().flatten(1).norm(dim=1).max() + 1, (
        "Lipschitz by its spectral norms"
    )
    assert len(maps) == len(discriminator.layers) - 1


@pytest.mark.slow
def test_the_job_trains_the_decoder_alone_and_the_same_command_goes_on(tmp_path: Path) -> None:
    faces = FacesConfig(views=4, size=64)
    FacesWriter(str(tmp_path / "faces"), faces)({"numbers": [0, 1]})
    FacesFolder(str(tmp_path / "faces"), faces).finish()

    def sharpened(name: str, *steps: int) -> BaseModel:
        places = {"faces": str(tmp_path / "faces"), "work": str(tmp_path / name), "out": str(tmp_path / name / "out")}
        training = LoopConfig(
            steps=4, batch_size=4, warmup=1, weight_decay=0.0, ema_decay=0.5, checkpoint_every=2, learning_rate=1e-3
        )
        for _ in steps:
            sharpen_decoder.run(sharpen_decoder.Config(**places, training=training), "")
        return BaseModel.from_pretrained(places["out"])

    before, after = BaseModel.from_pretrained("tiny-sd"), sharpened("calm", 4)
    changed = {
        f"{part}.{name}"
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(after, part).state_dict().items()
        if not torch.equal(value, getattr(before, part).state_dict()[name])
    }
    assert changed
    assert all(name.startswith(("vae.decoder", "vae.post_quant_conv")) for name in changed)
    assert torch.equal(sharpened("calm", 4).vae.decoder.conv_out.weight, after.vae.decoder.conv_out.weight)


@pytest.mark.slow
def test_steps_bring_softened_pictures_nearer_to_their_photos() -> None:
    torch.manual_seed(0)
    base = BaseModel.from_pretrained("tiny-sd")
    photos = np.stack([photograph(sample_person(n), sample_view(n, 0)).image for n in range(4)])
    stage = DecoderStage(
        base.vae, photos, latents_for_decoder(base, photos, ["a photo of sks person"] * 4), recogniser_features()
    )
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 1e-3, betas=(0.5, 0.99))
    rows, features = stage.inputs(np.arange(4)), []
    for step in range(15):
        loss_B, parts = stage(rows, {}, step)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
        features.append(float(parts["features"].mean()))
    assert features[-1] < 0.95 * features[0]
