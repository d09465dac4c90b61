#!/usr/bin/env python
"""What fine-tuning SD 1.5 must cost at least: arithmetic and memory of one sample, counted without a GPU or weights.

    python benchmarks/sd15_cost.py

Runs forward and backward of SD 1.5's UNet with LoRAs on fake tensors (shapes, no numbers): FLOPs by torch's counter,
memory as the bytes that autograd keeps for the backward. Not counted: optimiser and LoRAs (1 MB a person), workspace,
fragmentation, kernels' efficiency. So these are lower bounds, not measurements of a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "sd15.yaml"


def count(samples: int, config: CorpusConfig, attention: SDPBackend) -> tuple[float, float, float]:
    """(FLOPs of the forward, FLOPs of forward and backward, bytes kept for the backward) of one person's step."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(storage)  # or another tensor could get its number
        return tensor

    dtype = getattr(torch, config.dtype)
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        lora = config.lora
        layout = LoRALayout.from_unet(unet, lora.rank, lora.target_modules, lora.alpha)
        weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        bank = LoRABank(unet, layout)
        vectors_KN = torch.randn(1, layout.size, requires_grad=True)
        x = torch.randn(samples, 4, 64, 64, dtype=dtype)
        text = torch.randn(samples, 77, 768, dtype=dtype)
        timesteps = torch.zeros(samples, dtype=torch.long)
        with sdpa_kernel(attention), bank.active(vectors_KN, samples), FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = unet(x, timesteps, text).sample.float().square().mean()
            forward = counter.get_total_flops()
            loss.backward()
            total = counter.get_total_flops()
    return forward, total, sum(size for storage, size in kept.items() if storage not in weights)


def main() -> None:
    config = load_config(CorpusConfig, CONFIG)
    tune = config.finetune
    samples = tune.batch_size + tune.prior_batch_size
    forward, total, _ = count(samples, config, SDPBackend.MATH)  # the counter sees no FLOPs in the fused kernel
    _, _, kept = count(
        samples, config, SDPBackend.FLASH_ATTENTION
    )  # which is what a GPU runs, and keeps no S x S matrix
    each = total * tune.steps
    print(f"one sample: forward {forward / samples / 1e9:.0f} GFLOP, with backward {total / samples / 1e9:.0f} GFLOP")
    print(f"one sample keeps {kept / samples / 1e9:.2f} GB for the backward; K = {config.people_per_group} people with")
    print(f"{samples} samples each: {config.people_per_group * kept / 1e9:.0f} GB")
    print(f"one LoRA: {tune.steps} steps x {samples} samples = {each / 1e15:.2f} PFLOP")
    for sustained in (100, 150, 400, 790):
        print(f"  at {sustained} TFLOP/s sustained: {each / sustained / 1e12:.1f} s")


if __name__ == "__main__":
    main()
