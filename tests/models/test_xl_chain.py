"""Stable Diffusion XL the whole way, narrow and random: photos, corpus, training, endpoint, picture, files of other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factory_world import build_corpus, make_config
from safetensors.torch import load
from serve_client import ADA, Client, pixels
from tiny_xl import tiny_xl

from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.endpoint.local import local_studio
from lora_diffusion.lora import formats
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.begin import begin
from lora_diffusion.synthesis.training.dataset import open_rows
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.train_config import TrainConfig

LOOP = {"steps": 6, "batch_size": 4, "validate_every": 3, "log_every": 3}


@pytest.mark.slow
def test_photos_become_a_corpus_a_synthesiser_pictures_and_files(world: Path, tmp_path: Path) -> None:
    pipe = tiny_xl(words=True)
    pipe.save_pretrained(tmp_path / "xl")
    place = {"people": str(world / "people"), "output": str(tmp_path / "corpus"), "base": str(tmp_path / "xl")}
    build_corpus(make_config(world, **place, finetune={"steps": 2, "train_A": False}))
    reader = CorpusReader(tmp_path / "corpus")
    assert len(reader) == 8

    training = {
        "corpus": place["output"],
        "output": str(tmp_path / "training"),
        "code_space": "pca",
        "denoiser_training": LOOP,
    }
    small = {
        "pca": {"num_components": 4},
        "denoiser": {"width": 16, "depth": 1},
        "data": {"cache": str(tmp_path / "cache")},
    }
    config = from_dict(TrainConfig, {**training, **small, "standardise": "together"})
    snapshot = begin(config)
    SynthesizerTraining(config, snapshot, open_rows(snapshot, config.data), open_store(config.output)).run()

    model = Synthesizer.from_pretrained(tmp_path / "training" / "synthesizer")
    assert model.identity.base.fingerprint == reader.manifest.base["fingerprint"]
    api = Client(local_studio(ServeConfig(synthesizer=str(tmp_path / "training" / "synthesizer"))))
    fast = {"num_inference_steps": "2", "latent_inference_steps": "2", "num_images": "1"}
    drawn = api.form("/v1/personalize", ADA, prompt="a photo of sks person", format="kohya", **fast)
    assert drawn.status_code == 200, drawn.text
    (image,) = drawn.json()["images"]
    assert pixels(image["data"]).shape == (32, 32, 3)
    vector_N = None
    for dialect in ("vector", "diffusers", "kohya"):
        answer = api.form("/v1/loras", ADA, format=dialect, seed="7", latent_inference_steps="2")
        assert answer.status_code == 200, answer.text
        (tmp_path / f"{dialect}.safetensors").write_bytes(answer.content)
        found_N = formats.load(tmp_path / f"{dialect}.safetensors", model.layout)
        vector_N = found_N if vector_N is None else vector_N
        assert torch.allclose(found_N, vector_N, atol=1e-6)
    assert all(name.startswith("lora_unet_") for name in load(answer.content))
    assert any("input_blocks" in name for name in load(answer.content)), "as kohya calls the layers of XL"
    for dialect in ("diffusers", "kohya"):
        pipe.load_lora_weights(tmp_path / f"{dialect}.safetensors", adapter_name=dialect)
    assert set(pipe.get_list_adapters()["unet"]) == {"diffusers", "kohya"}
