"""What a base model is, whatever its files are called, and whichever dtype and device it was loaded in.

Weights count as float16: a model in float32 and its `variant="fp16"` are one, and a float32 copy of either gives it again.
bfloat16 has fewer digits than that, so `BaseModel.from_pretrained` takes the fingerprint before it rounds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

EXACT = (torch.float32, torch.float16)
"""Dtypes that lose nothing of the fingerprint."""
DIGITS = 20
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
EARLIER = {"280ede7ac3e2bd50e780": ("b486db5bb0ed5c8a64c0", "95a6a9ba0026c015", "7dc10c716f5bdcf6", "254dc543938cbd06")}
"""What earlier releases called the bundled model; the first is the same but for the decoder of its autoencoder, of which no LoRA
knows. `old_fingerprints` finds the others only on some processors."""


def model_fingerprint(parts: Mapping[str, nn.Module], scheduler: Any) -> str:
    """20 hex digits of SHA-256 over the content of all weights and the scheduler's noise schedule.

    Of `parts` the order counts, as `networks_of` gives it. Neither names nor the order of tensors count: libraries rename
    them from release to release, and single-file checkpoints have names of their own. Hashes in threads: 1 s of one core for each GB of float16.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for label in parts:
            weights = [tensor for tensor in parts[label].state_dict().values() if tensor.is_floating_point()]
            digest.update(label.encode())
            digest.update(b"".join(sorted(pool.map(_content, weights))))
    config = {key: scheduler.config.get(key) for key in _SCHEDULE}
    config["rescale_betas_zero_snr"] = bool(scheduler.config.get("rescale_betas_zero_snr"))
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:DIGITS]


def _content(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor.detach().half())).digest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def old_fingerprints(parts: Mapping[str, nn.Module], scheduler: Any, dtypes: Iterable[torch.dtype]) -> Iterable[str]:
    """What earlier releases called this model: 16 hex digits over names and weights, another one for each dtype.

    They hashed the computed noise schedule, too, whose last bits differ between processors: on another kind of processor
    than the earlier release ran on, a model may be taken for an unknown one, never for another.
    """
    for dtype in dtypes:
        digest = hashlib.sha256()
        for label in parts:
            for key, tensor in sorted(parts[label].state_dict().items()):
                tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
                digest.update(f"{label}.{key}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
                digest.update(_bytes(tensor))
        digest.update(scheduler.alphas_cumprod.double().cpu().numpy().tobytes())
        digest.update(str(scheduler.config.prediction_type).encode())
        yield digest.hexdigest()[:16]
