"""configs/sd15.yaml, train_sd15.yaml and serve_sd15.yaml one after the other, on one narrow SD 1.5 of random weights.

The corpus is made in bfloat16, the endpoint draws in float16, the command line in float32: one base model all the same.
"""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from factory_world import build_corpus
from narrow_sd15 import save_narrow_sd15
from serve_client import ADA, Client

from lora_diffusion.cli import main
from lora_diffusion.config import load_config
from lora_diffusion.endpoint.local import local_studio
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.lora import formats
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.training.begin import begin
from lora_diffusion.synthesis.training.dataset import open_rows
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.train_config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LOOP = ("steps=2", "batch_size=8", "warmup=1", "validate_every=2")


@pytest.fixture(scope="module")
def synthesizer(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training gives; of the production files only places, sizes and numbers of steps are changed."""
    folder = tmp_path_factory.mktemp("production")
    small = ["limit=4", "finetune.steps=2", "class_images=1", "score.num_inference_steps=2", "photos.min_photos=2"]
    places = [f"people={world / 'people'}", f"output={folder / 'corpus'}", f"base={save_narrow_sd15(folder / 'sd15')}"]
    config = load_config(CorpusConfig, CONFIGS / "sd15.yaml", [*places, *small, "embedder.model=tiny"])
    build_corpus(config)
    assert config.dtype == "bfloat16"

    small = ["pca.num_components=4", "vae.latent_size=4", "vae.hidden=[8]", "denoiser.width=16", "denoiser.depth=1"]
    places = [f"corpus={folder / 'corpus'}", f"output={folder / 'run'}", f"data.cache={folder / 'cache'}"]
    small += [f"{stage}_training.{setting}" for stage in ("vae", "denoiser") for setting in LOOP]
    train = load_config(TrainConfig, CONFIGS / "train_sd15.yaml", [*places, *small])
    snapshot = begin(train)
    rows = open_rows(snapshot, train.data)
    SynthesizerTraining(train, snapshot, rows, open_store(train.output), say=lambda line: None).run()
    return folder / "run" / "synthesizer"


def test_the_production_files_fit_together(synthesizer: Path, tmp_path: Path) -> None:
    config = load_config(ServeConfig, CONFIGS / "serve_sd15.yaml", [f"synthesizer={synthesizer}", "device=cpu"])
    assert config.dtype == "float16"
    api = Client(local_studio(config))
    about = api("GET", "/v1/model").json()
    assert about["identity"]["recogniser"]["name"] == about["recogniser"] == "tiny"
    assert about["identity"]["base"] == {key: about["base"][key] for key in ("name", "fingerprint")}
    settings = {"prompt": "sks person", "seed": 1, "image_seed": 2, "num_inference_steps": 2, "format": "vector"}
    answer = api.form("/v1/personalize", ADA, **settings)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["images"]) == 1
    (tmp_path / "endpoint.safetensors").write_bytes(base64.b64decode(answer.json()["file"]["data"]))

    words = ["--synthesizer", str(synthesizer), "--out", str(tmp_path), "--format", "vector", "--steps", "2"]
    main(["personalize", str(ADA), *words, "--seed", "1", "--image-seed", "2"])  # in float32
    theirs, ours = (formats.load(tmp_path / name) for name in ("endpoint.safetensors", "lora.safetensors"))
    assert (theirs == ours).all()
