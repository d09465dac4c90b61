"""Weights of parameters: what they say an error costs is what it does to the model's prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.importance import loss_weights, output_weights
from lora_diffusion.synthesis.normaliser import Normaliser


def test_weights_foretell_how_much_a_small_error_changes_the_prediction() -> None:
    """One photo, one timestep: errors in B of random direction, against the change that they make."""
    base = BaseModel.from_pipeline(tiny_pipeline())
    base.scheduler = type(base.scheduler).from_config(base.scheduler.config, num_train_timesteps=1, trained_betas=[0.3])
    layout = LoRALayout.from_unet(base.unet, target_modules=("to_q", "to_v"))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    vector_N = initial_vectors(layout, 0)[0]
    weights_N = output_weights(base, layout, vector_N, pixels, "sks person", samples=64)
    assert not weights_N[~layout.mask_B()].any()  # B is zero here, so nothing feels A

    generator = torch.Generator().manual_seed(1)
    step, count = 1e-2, 32
    errors_SN = step * torch.randn(count, layout.size, generator=generator) * layout.mask_B()
    noise = torch.randn(1, *base.latent_shape, generator=generator)
    noisy = 0.7**0.5 * base.encode_images(pixels) + 0.3**0.5 * noise
    text, bank = base.encode_prompts(["sks person"]), LoRABank(base.unet, layout)

    def predict(vectors_SN: torch.Tensor) -> torch.Tensor:
        S = len(vectors_SN)
        with torch.no_grad(), bank.active(vectors_SN):
            return base.unet(noisy.expand(S, -1, -1, -1), 0, encoder_hidden_states=text.expand(S, -1, -1)).sample

    change = (predict(vector_N + errors_SN) - predict(vector_N[None])).square().mean()
    assert float(change) == pytest.approx(float((errors_SN.square() @ weights_N).mean()), rel=0.3)


def test_loss_weights_are_of_normalised_parameters_and_have_mean_1() -> None:
    normaliser = Normaliser(torch.zeros(4), torch.tensor([1.0, 0.0, 2.0, 3.0]))
    weights_M = loss_weights(torch.tensor([8.0, 99.0, 1.0, 0.0]), normaliser, floor=1e-3)
    assert weights_M.shape == (3,)
    assert float(weights_M.mean()) == pytest.approx(1)
    assert float(weights_M[0] / weights_M[1]) == pytest.approx(8 / 4)
    assert 0 < float(weights_M[2]) < 0.01
