"""Training of the base model: what it promises about resuming, words and losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion.storage import open_store
from lora_diffusion.training.loop import Loop, LoopConfig, Stage
from lora_diffusion.world.base import parts
from lora_diffusion.world.base import training as bt

CONFIG = parts.BaseModelConfig(
    latent_channels=4,
    vae_channels=(8, 8, 8),
    unet_channels=(16, 16),
    unet_attention=(False, True),
    attention_head_dim=8,
    text_width=32,
    text_layers=1,
)
CAPTIONS = ["a photo of sks person, smiling, beach background", "a photo of a man with a beard, wearing a red shirt"]


def autoencoder_stage() -> Stage:
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    return bt.AutoencoderStage(parts.new_autoencoder(CONFIG), images)


def denoiser_stage() -> Stage:
    torch.manual_seed(0)
    tokenizer = parts.train_tokenizer(CAPTIONS * 50, CONFIG)
    networks = parts.new_unet(CONFIG), parts.new_text_encoder(CONFIG, tokenizer), parts.new_scheduler(CONFIG)
    side = CONFIG.image_size // 4
    means, tokens = torch.randn(16, CONFIG.latent_channels, side, side), torch.randint(0, 50, (16, 3, 8))
    return bt.DenoiserStage(*networks, means, torch.full_like(means, 0.1), tokens)


@pytest.mark.parametrize("stage", [autoencoder_stage, denoiser_stage])
def test_an_interrupted_training_ends_with_the_same_weights(stage: Callable[[], Stage], tmp_path: Path) -> None:
    config = LoopConfig(steps=6, batch_size=4, warmup=2, checkpoint_every=3, log_every=1)
    whole = Loop("base", stage(), config, open_store(tmp_path / "whole"))
    whole.run()

    class Killed(Exception):
        pass

    def die(values: dict[str, Any]) -> None:
        if values["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        Loop("base", stage(), config, open_store(tmp_path / "parts")).run(die)
    second = Loop("base", stage(), config, open_store(tmp_path / "parts"))
    assert second.resumed_at == 3
    second.run()
    average = whole.state.average
    assert all(torch.equal(tensor, average[name]) for name, tensor in second.best_weights().items())


def test_words_of_the_captions_are_single_tokens_and_strange_words_are_not_lost() -> None:
    tokenizer = parts.train_tokenizer(CAPTIONS * 50, CONFIG)
    ids = tokenizer("smiling, beach background").input_ids
    assert len(ids) == 2 + 4  # start, smiling, comma, beach, background, end
    strange = tokenizer("xylophone").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]
    assert tokenizer.decode(strange, skip_special_tokens=True).replace(" ", "") == "xylophone"


def test_a_saved_tokenizer_reads_the_same(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = parts.train_tokenizer(CAPTIONS * 50, CONFIG)
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for caption in CAPTIONS:
        assert again(caption).input_ids == tokenizer(caption).input_ids


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction_type: str) -> None:
    """The stage asks for the target of its prediction type: an oracle that knows it scores zero."""
    config = parts.BaseModelConfig(**{**CONFIG.__dict__, "prediction_type": prediction_type})
    scheduler = parts.new_scheduler(config)
    latents = torch.randn(4, 4, 8, 8)

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noisy: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> object:
            alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            clean = latents[rows]
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            answer = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
            return type("Output", (), {"sample": answer + self.weight})

    rows = np.array([2, 0, 3, 1])
    stage = bt.DenoiserStage(
        Oracle(), lambda ids: (ids,), scheduler, latents, torch.zeros_like(latents), torch.zeros(4, 2, 7)
    )
    loss_B, _ = stage(stage.inputs(rows), stage.draws(4, torch.Generator().manual_seed(0)), step=0)
    assert loss_B.shape == (4,)
    assert float(loss_B.max()) < 1e-5


def test_one_error_of_x0_weighs_the_same_whatever_is_predicted() -> None:
    """An error in x0 of size 1 is one of SNR in epsilon and of SNR + 1 in v: times the weights, all are equal."""
    timesteps = torch.arange(0, 999)  # at the last there is no signal, and x0 does not follow from epsilon
    weighted = {}
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = parts.new_scheduler(parts.BaseModelConfig(**{**CONFIG.__dict__, "prediction_type": kind}))
        snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
        size = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[kind]
        weighted[kind] = bt.loss_weights(scheduler, timesteps) * size
    torch.testing.assert_close(weighted["epsilon"], weighted["sample"])
    torch.testing.assert_close(weighted["v_prediction"], weighted["sample"])


def test_pure_noise_counts_as_much_as_any_noise() -> None:
    """Sampling starts at zero SNR: the velocity there must be learned (plain min-SNR would give it no weight at all)."""
    scheduler = parts.new_scheduler(CONFIG)
    weights = bt.loss_weights(scheduler, torch.tensor([999, 700, 500, 0]))
    torch.testing.assert_close(weights[:3], torch.ones(3))
    assert weights[3] < 0.1


def test_the_words_reach_the_unet_beside_its_attention_but_not_before_training() -> None:
    torch.manual_seed(0)
    unet = parts.new_unet(CONFIG).eval()
    size = unet.config.sample_size
    x = torch.randn(1, CONFIG.latent_channels, size, size)
    text = torch.randn(2, 1, 8, CONFIG.text_width)
    time = unet.get_aug_embed(emb=x, encoder_hidden_states=text[0], added_cond_kwargs={})
    assert not time.any()
    torch.nn.init.ones_(unet.add_embedding.norm2.weight)
    first, second = (unet.get_aug_embed(emb=x, encoder_hidden_states=t, added_cond_kwargs={}) for t in text)
    assert (first - second).abs().max() > 0.1
