"""What ComfyUI does with a LoRA file for a Stable Diffusion UNet, by its public rules (comfy/lora.py, weight_adapter/lora.py):
which names it accepts for a layer, which suffixes, and how alpha scales. What it does not accept it leaves out with a
line in its log, and draws without it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_diffusion.lora.dialects import stability_names  # checked against diffusers' converter in test_dialects.py

_SUFFIXES = [  # of B and A, in ComfyUI's order
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
]


def accepted_names(layer: str, per_block: int) -> list[str]:
    """Of a layer that diffusers calls `layer`."""
    flat = layer.replace(".", "_")
    old = layer.replace(".to_", ".processor.to_")
    old = old.removesuffix(".0") if old.endswith(".to_out.0") else old
    names = [f"lora_unet_{flat}", f"lycoris_{flat}", old, f"unet.{old}"]
    for name in stability_names(layer, per_block):
        names += [f"lora_unet_{name.replace('.', '_')}", f"diffusion_model.{name}"]
    return names


def patch(unet: nn.Module, tensors: Mapping[str, Tensor], per_block: int) -> tuple[list[str], list[str]]:
    """Add the file's updates to the weights of `unet`; names of the layers that got one, and keys that were not used."""
    left, patched = dict(tensors), []
    for layer, module in unet.named_modules():
        for name in accepted_names(layer, per_block) if getattr(module, "weight", None) is not None else ():
            alpha = left.pop(f"{name}.alpha", None)
            for up, down in _SUFFIXES:
                if name + up in left:
                    B, A = left.pop(name + up), left.pop(name + down)
                    scale = 1.0 if alpha is None else alpha.item() / A.shape[0]
                    module.weight.data += scale * (B.flatten(1) @ A.flatten(1)).reshape(module.weight.shape)
                    patched.append(layer)
                    break
    return patched, sorted(left)
