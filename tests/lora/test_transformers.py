"""Layout and bank hold for the transformers of flow-matching models as they do for UNets: the gradient of two people at once
is peft's for each."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import initial_vectors
from lora_diffusion.lora.layout import LoRALayout

Model = SD3Transformer2DModel | FluxTransformer2DModel


def sd3() -> tuple[Model, Tensor, dict[str, Tensor]]:
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    text = {"encoder_hidden_states": torch.randn(4, 5, 12), "pooled_projections": torch.randn(4, 10)}
    return model, torch.randn(4, 16, 8, 8), text


def flux() -> tuple[Model, Tensor, dict[str, Tensor]]:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    text = {
        "encoder_hidden_states": torch.randn(4, 5, 12),
        "pooled_projections": torch.randn(4, 10),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.ones(4),
    }
    return model, torch.randn(4, 16, 16), text


@pytest.mark.parametrize("family", [sd3, flux])
def test_the_gradient_of_two_people_at_once_is_that_of_peft_for_each(family: Any) -> None:
    torch.manual_seed(0)
    model, clean, text = family()
    model.eval().requires_grad_(False)
    layout = LoRALayout.from_unet(model, rank=2, alpha=3.0, target_modules=("to_q", "to_v", "norm1.linear", "to_out.0"))
    sigma = torch.tensor([0.1, 0.4, 0.6, 0.9])
    noise = torch.randn_like(clean)
    share = sigma.view(-1, *(1 for _ in clean.shape[1:]))
    noisy, target = (1 - share) * clean + share * noise, noise - clean
    times = sigma if family is flux else 1000 * sigma  # FLUX multiplies them itself

    def loss(network: Model, rows: slice) -> Tensor:
        given = {name: value[rows] if len(value) == 4 else value for name, value in text.items()}
        answer = network(hidden_states=noisy[rows], timestep=times[rows], return_dict=False, **given)[0]
        return (answer - target[rows]).square().flatten(1).mean(1)

    start_KN = initial_vectors(layout, seed=0, K=2) + 0.05 * torch.randn(2, layout.size)
    vectors_KN = start_KN.clone().requires_grad_()
    with LoRABank(model, layout).active(vectors_KN, 2):
        loss(model, slice(0, 4)).view(2, 2).mean(1).sum().backward()
    names = [entry.name for entry in layout.entries]
    for k in range(2):
        config = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=names)
        alone = peft.inject_adapter_in_model(config, copy.deepcopy(model))
        learned = []
        for name, pair in layout.split(start_KN[k : k + 1]).items():
            for side, begin in zip(("lora_A", "lora_B"), pair, strict=True):
                learned.append(getattr(alone.get_submodule(name), side)["default"].weight)
                learned[-1].data.copy_(begin[0])
        loss(alone, slice(2 * k, 2 * k + 2)).mean().backward()
        expected_N = torch.cat([weight.grad.flatten() for weight in learned])
        assert expected_N.norm() > 1e-3
        assert vectors_KN.grad is not None
        assert (vectors_KN.grad[k] - expected_N).norm() < 1e-4 * expected_N.norm()
