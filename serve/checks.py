"""Limits of this server, which the schemas do not know: images, samples, steps, prompt length, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_diffusion.serving.config import LimitsConfig
from lora_diffusion.serving.messages import Floats
from serve.problems import ApiError

# field of a request -> its limit
BOUNDS = {
    "num_images": "max_images",
    "num_samples": "max_samples",
    "num_inference_steps": "max_inference_steps",
    "latent_inference_steps": "max_inference_steps",
    "guidance_scale": "max_guidance_scale",
    "num": "max_interpolations",
}
LENGTHS = {
    "photos": "max_photos",
    "positions": "max_interpolations",
    "prompt": "max_prompt_chars",
    "negative_prompt": "max_prompt_chars",
}


def check_limits(request: Any, limits: LimitsConfig) -> None:
    """Raises ApiError for the first field that asks for more than this server gives."""
    for bounds, measure in ((BOUNDS, lambda value: value), (LENGTHS, len)):
        for field, limit in bounds.items():
            value = getattr(request, field, None)
            if value is not None and measure(value) > getattr(limits, limit):
                what = f"{field} is {measure(value)}" if measure is not len else f"{field} has a length of {len(value)}"
                detail = f"{what}; this server allows at most {getattr(limits, limit):g}."
                raise ApiError("invalid_request", detail, errors=[{"where": field, "message": detail}])
    prompt = getattr(request, "prompt", None)
    if prompt is not None and not prompt.strip():
        raise ApiError("invalid_request", "prompt is blank: say what to draw, for example `a photo of sks person`.")


def unit_embedding(values: Sequence[float], size: int) -> Floats:
    """(C,) of unit length. Raises ApiError for another length, and for one that points nowhere."""
    vector = np.asarray(values, np.float64)
    if len(vector) != size:
        raise ApiError(
            "invalid_request", f"embedding has {len(vector)} numbers; the recogniser of this server gives {size}."
        )
    largest = float(np.abs(vector).max())
    if largest < 1e-6:
        raise ApiError("invalid_request", "embedding is zero: it shows nobody. Ask POST /v1/embeddings for one.")
    vector = vector / largest  # numbers near the end of the range must not overflow in the norm
    return np.asarray(vector / np.linalg.norm(vector), np.float32)
