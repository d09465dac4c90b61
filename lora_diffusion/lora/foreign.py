"""The one place that knows how peft, diffusers and kohya name LoRA tensors, and where each keeps alpha.

                A                                       B                                      alpha
    peft        base_model.model.<m>.lora_A.weight      base_model.model.<m>.lora_B.weight     adapter_config.json
    diffusers   unet.<m>.lora_A.weight                  unet.<m>.lora_B.weight                 safetensors metadata
    kohya       lora_unet_<m_>.lora_down.weight         lora_unet_<m_>.lora_up.weight          lora_unet_<m_>.alpha

<m> is the module's name in the UNet, <m_> the same with "_" for ".". Everybody computes W x + alpha / rank * B (A x).
Where a file says nothing of alpha, diffusers and kohya take alpha = rank.

Axes: R rank, I / O features in / out.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.lora.layout import LoRAEntry, LoRALayout

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"

# Besides the names above: an adapter's name inside (weights2weights writes lora_A.identity1.weight), no prefix
# (diffusers' save_lora_adapter), and lora.down / lora.up (diffusers' training scripts).
_DOTTED = re.compile(r"^(?:base_model\.model\.|unet\.)?(.+)\.(lora_A|lora_B|lora\.down|lora\.up)(?:\.\w+)?\.weight$")
_KOHYA = re.compile(r"^(lora_unet_\w+)\.(?:(lora_down|lora_up)\.weight|alpha)$")
_SIDE = {
    "lora_A": "A",
    "lora.down": "A",
    "lora_down": "A",
    "lora_B": "B",
    "lora.up": "B",
    "lora_up": "B",
    None: "alpha",
}
# Variants of LoRA that a vector cannot hold: they must be absent, false or empty.
_VARIANTS = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")

Matrices = dict[str, tuple[Tensor, Tensor]]
"""Module name -> A (R, I), B (O, R)."""


def encode(matrices: Matrices, layout: LoRALayout, format: str) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Tensors and metadata of the safetensors file, and for peft the text of `adapter_config.json`."""
    tensors: dict[str, Tensor] = {}
    for entry in layout.entries:
        name = entry.name
        A, B = (
            matrix.reshape(shape) for matrix, shape in zip(matrices[name], _file_shapes(entry, layout), strict=True)
        )
        if format == "kohya":
            module = _kohya_name(name)
            tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = A, B
            tensors[f"{module}.alpha"] = torch.tensor(layout.alpha, dtype=torch.float32)
        else:
            prefix = "base_model.model" if format == "peft" else "unet"
            tensors[f"{prefix}.{name}.lora_A.weight"], tensors[f"{prefix}.{name}.lora_B.weight"] = A, B
    config = {"r": layout.rank, "lora_alpha": layout.alpha, "target_modules": [entry.name for entry in layout.entries]}
    if format == "peft":
        return tensors, {}, json.dumps({"peft_type": "LORA", **config}, indent=2)
    if format == "diffusers":  # Passed on to peft's LoraConfig, so it may hold nothing that peft does not know.
        return tensors, {DIFFUSERS_CONFIG: json.dumps({f"unet.{key}": value for key, value in config.items()})}, None
    network = {"ss_network_dim": str(layout.rank), "ss_network_alpha": str(layout.alpha)}
    return tensors, {"ss_network_module": "networks.lora", **network}, None


def decode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layout: LoRALayout, source: Path
) -> tuple[Matrices, dict[str, float]]:
    """Matrices and alpha of each module, from the tensors and metadata of the safetensors file `source`.

    Raises:
        ValueError: tensors that are foreign to the layout, missing or of another shape; a variant of LoRA that a
            vector cannot hold; peft keys without the config that holds their alpha.
    """
    modules = {_kohya_name(entry.name): entry.name for entry in layout.entries}
    known = set(modules.values())
    named: dict[tuple[str, str], Tensor] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := _KOHYA.match(key):
            place = modules.get(match[1], ""), _SIDE.get(match[2], "alpha")
        elif match := _DOTTED.match(key):
            place = match[1], _SIDE[match[2]]
        else:
            place = "", ""
        if place in named or place[0] not in known:
            foreign.append(key)
        named[place] = tensor
    _check_fit(named, foreign, layout, source)
    matrices = {e.name: (named[e.name, "A"].flatten(1), named[e.name, "B"].flatten(1)) for e in layout.entries}

    alpha: float = layout.rank
    if any(key.startswith("base_model.model.") for key in tensors):
        config_path = source.parent / PEFT_CONFIG
        if not config_path.is_file():
            raise ValueError(f"{source} has peft's keys, but no {PEFT_CONFIG} beside it: its alpha is unknown")
        alpha = _alpha_of(json.loads(config_path.read_text()), config_path)
    elif DIFFUSERS_CONFIG in metadata:
        config = json.loads(metadata[DIFFUSERS_CONFIG])
        alpha = _alpha_of({key.removeprefix("unet."): value for key, value in config.items()}, source)
    own = {name: named.get((name, "alpha")) for name in matrices}
    return matrices, {name: alpha if tensor is None else float(tensor) for name, tensor in own.items()}


def _check_fit(named: Mapping[tuple[str, str], Tensor], foreign: list[str], layout: LoRALayout, source: Path) -> None:
    missing, shaped = [], []
    for entry in layout.entries:
        shapes = dict(zip("AB", _file_shapes(entry, layout), strict=True))
        for side, shape in shapes.items():
            tensor = named.get((entry.name, side))
            if tensor is None:
                missing.append(f"{entry.name}.{side}")
            elif tuple(tensor.shape) != shape or not tensor.is_floating_point():
                shaped.append(f"{entry.name}.{side} is {tensor.dtype} {tuple(tensor.shape)}, expected floats {shape}")
        if named.get((entry.name, "alpha"), torch.ones(())).numel() != 1:
            shaped.append(f"{entry.name}.alpha, expected one number")
    problems = {"foreign": foreign, "missing": missing, "of another shape": shaped}
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {what}: {keys[:3]}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"{source} does not fit layout {layout.layout_id} (rank {layout.rank}, {len(layout.entries)} modules, "
            f"target_modules {layout.target_modules}). Tensors {listed}. Build the layout from the UNet that the file "
            "was trained on, with the file's rank and target_modules; a vector has no place for LoRAs of text encoders"
        )


def _file_shapes(entry: LoRAEntry, layout: LoRALayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in files: a convolution's A is a filter (R, channels, height, width), its B one of 1 x 1."""
    inputs, (outputs, *ones) = entry.weight_shapes
    return (layout.rank, *inputs), (outputs, layout.rank, *ones)


def _alpha_of(config: Mapping[str, Any], source: Path) -> float:
    """`lora_alpha` of a peft config, if it is one of plain LoRA."""
    if variants := [key for key in _VARIANTS if config.get(key)]:
        raise ValueError(f"{source} uses {variants}; a vector holds plain LoRA with one rank and one alpha only")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{source} has lora_alpha {config.get('lora_alpha')!r}; expected a number")
    return float(config["lora_alpha"])


def _kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")
