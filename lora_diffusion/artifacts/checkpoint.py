"""Training state on disk: one safetensors file and one JSON, written so that a crash leaves the old or the new, never half.

No pickle: tensors are flattened under dotted names (``model.*``, ``ema.*``, ``optimizer.*``), everything else is JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write ``state.safetensors`` with ``meta`` in its header; a rename makes it visible whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.safetensors.tmp"
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"meta": json.dumps(meta)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / "state.safetensors")


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and meta of the newest state in ``folder``, or None where there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as flat tensors, ``{parameter index}.{name}``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``, on an optimiser over the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
