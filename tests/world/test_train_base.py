"""`jobs/world/train_base.py`: from rendered faces to a pipeline folder that diffusers loads, on Ray Train, resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "recipe.model.latent_channels=4",
    "recipe.model.vae_channels=[8,8,8]",
    "recipe.model.unet_channels=[16,16]",
    "recipe.model.unet_attention=[false,true]",
    "recipe.model.text_width=32",
    "recipe.model.text_layers=1",
    *(
        f"recipe.{stage}.{key}"
        for stage in ("autoencoder", "denoiser")
        for key in ("steps=3", "batch_size=4", "checkpoint_every=2")
    ),
]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    places = [
        f"recipe.faces={folder}/faces",
        f"recipe.work={folder}/work",
        f"recipe.out={folder}/tiny-sd",
        f"storage={folder}/ray",
    ]
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/world/train_base.py"), *places, *SMALL, *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )


@pytest.mark.ray
def test_the_job_trains_a_pipeline_once(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    faces = FacesConfig(views=3, size=64)
    FacesWriter(str(tmp_path / "faces"), faces)({"numbers": [0, 1]})
    FacesFolder(str(tmp_path / "faces"), faces).finish()
    first = run(tmp_path, "num_workers=2", "cpus_per_worker=1")
    assert first.returncode == 0, first.stderr[-3000:]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny-sd")
    assert pipe.unet.config.sample_size == 16
    picture = pipe("a photo of sks person", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)

    lines = (tmp_path / "work/progress.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"autoencoder", "denoiser"}
    again = run(tmp_path, "num_workers=2", "cpus_per_worker=1")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "work/progress.jsonl").read_text().splitlines() == lines  # not one step more


@pytest.mark.slow
def test_a_wrong_key_is_told_before_anything_starts(tmp_path: Path) -> None:
    result = run(tmp_path, "recipe.denoiser.stepz=4")
    assert result.returncode == 1
    assert "stepz" in result.stderr
    assert "steps" in result.stderr
    assert not list(tmp_path.iterdir())
