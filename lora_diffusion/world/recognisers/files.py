"""Recogniser networks by name, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lora_diffusion.world.recognisers.network import FaceRecogniser, RecogniserConfig
from lora_diffusion.world.recognisers.network_patches import PatchRecogniser


def build_recogniser(config: RecogniserConfig) -> nn.Module:
    """The network that `config.architecture` names."""
    known: dict[str, type[nn.Module]] = {"resnet": FaceRecogniser, "patches": PatchRecogniser}
    if config.architecture not in known:
        raise ValueError(f"Unknown architecture {config.architecture!r}; there are {sorted(known)}.")
    return known[config.architecture](config)


def save_recogniser(model: nn.Module, config: RecogniserConfig, path: Path) -> None:
    """Weights as safetensors, the configuration in its header."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "lora-diffusion recogniser 1", "config": json.dumps(config.to_dict())})


def load_recogniser(path: Path) -> nn.Module:
    """The network of a file that `save_recogniser` wrote, in evaluation mode."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("config", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in header.items()
    }
    model = build_recogniser(RecogniserConfig(**fields))
    model.load_state_dict(tensors)
    return model.eval()
