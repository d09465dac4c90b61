"""Limits of this server, which the schemas do not know: images, samples, steps, prompt length, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.faces.unit import unit
from lora_diffusion.serving.config import LimitsConfig
from lora_diffusion.serving.messages import Floats

# field of a request -> the limit of its value, or of its length
BOUNDS = {
    "num_images": "max_images",
    "num_samples": "max_samples",
    "num_inference_steps": "max_inference_steps",
    "latent_inference_steps": "max_inference_steps",
    "guidance_scale": "max_guidance_scale",
    "num": "max_interpolations",
    "photos": "max_photos",
    "positions": "max_interpolations",
    "prompt": "max_prompt_chars",
    "negative_prompt": "max_prompt_chars",
}


def check_limits(request: BaseModel, limits: LimitsConfig) -> None:
    """Raises ApiError for the first field that asks for more than this server gives."""
    for field, limit in BOUNDS.items():
        value, most = getattr(request, field, None), getattr(limits, limit)
        size = len(value) if isinstance(value, str | list) else value
        if size is not None and size > most:
            unit = " characters" if isinstance(value, str) else " entries"
            what = f"has {size:,}{unit}" if isinstance(value, str | list) else f"is {size:,}"
            message = f"{what}; this server allows at most {most:,}."
            raise ApiError("invalid_request", f"{field} {message}", errors=[{"where": field, "message": message}])


def check_recogniser(fingerprint: str | None, ours: Mapping[str, str]) -> None:
    """Raises ApiError for an embedding that another recogniser made: it would give a stranger's LoRA."""
    if fingerprint and ours["fingerprint"] and fingerprint != ours["fingerprint"]:
        raise ApiError(
            "invalid_request",
            f"The embedding is of the recogniser {fingerprint}; this server's is {ours['name']} ({ours['fingerprint']}). "
            "Ask POST /v1/embeddings for one, or send the photo.",
        )


def unit_embedding(values: Sequence[float], size: int, name: str = "embedding") -> Floats:
    """(C,) of unit length. Raises ApiError for another length, and for one that points nowhere."""
    vector = np.asarray(values, np.float64)
    if len(vector) != size:
        raise ApiError(
            "invalid_request", f"{name} has {len(vector)} numbers; the recogniser of this server gives {size}."
        )
    largest = float(np.abs(vector).max())
    if largest < 1e-6:
        raise ApiError("invalid_request", f"{name} is zero: it shows nobody. Ask POST /v1/embeddings for one.")
    # numbers near the end of the range must not overflow in the norm
    return unit(vector if largest <= 1 else vector / largest)
