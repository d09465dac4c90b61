"""Where models run."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """torch's device of that name; `auto` is the GPU if there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # torch has an AssertionError, a RuntimeError or an error of the driver for it
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"there is no device {str(device)!r} here; torch sees {', '.join(there)}: choose one of them or auto (a job's "
            "worker sees the GPUs that it asks for: workers.finetune_gpus=1)"
        ) from error
    return found
