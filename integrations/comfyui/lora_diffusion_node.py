"""ComfyUI node: photos of one face -> a LoRA -> the model with it. Copy this one file to ComfyUI/custom_nodes/.

With a server (`lora-diffusion serve`) nothing has to be installed beside ComfyUI; its key, if it asks for one, is read from
LORA_DIFFUSION_API_KEY. Without one the LoRA is made in ComfyUI's process, by `pip install 'lora-diffusion[torch]'`.

The checkpoint must be the base model that the synthesiser was trained for. Call the person `sks person` in the prompt.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image
from torch import Tensor

TIMEOUT_SECONDS = 120.0


class LoRADiffusionFromPhoto:
    """Axes of `photos`, ComfyUI's IMAGE: B photos of one person, H and W pixels, C = RGB between 0 and 1."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "photos": ("IMAGE", {"tooltip": "of one person; several are averaged"}),
                "strength": ("FLOAT", strength),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1}),
                "server": ("STRING", {"default": "http://127.0.0.1:8000", "tooltip": "empty: made in this process"}),
                "synthesizer": (
                    "STRING",
                    {"default": "tiny", "tooltip": "in this process: a folder, or a shipped name"},
                ),
                "largest_face": ("BOOLEAN", {"default": False, "tooltip": "of a photo of several people"}),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "loaders"
    DESCRIPTION = "Photos of one face -> LoRA -> model. Say `sks person` in the prompt."

    def apply(
        self,
        model: Any,
        photos: Tensor,
        strength: float,
        seed: int,
        server: str,
        synthesizer: str,
        largest_face: bool,
    ) -> tuple[Any]:
        """Raises ValueError with what the server or the library says, and for a LoRA of another base model."""
        import comfy.lora
        import comfy.sd

        pixels_BHWC = (photos.detach().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
        faces = "largest" if largest_face else "one"
        if server.strip():
            file = from_server(pixels_BHWC, seed, faces, server.strip())
        else:
            file = from_library(pixels_BHWC, seed, faces, synthesizer.strip())
        lora = safetensors.torch.load(file)
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        layers = {key.partition(".")[0] for key in lora}
        if strange := sorted(layers - known.keys()):
            raise ValueError(
                f"the LoRA is for another base model: this one lacks {len(strange)} of its {len(layers)} layers, such as "
                f"{strange[0]}. Load the checkpoint that the synthesiser was trained for"
            )
        return (comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0],)


def from_server(pixels_BHWC: np.ndarray, seed: int, faces: str, server: str) -> bytes:
    """The LoRA's file in kohya's form, which ComfyUI reads exactly."""
    photos = [base64.b64encode(png(pixels_HWC)).decode() for pixels_HWC in pixels_BHWC]
    body = json.dumps({"photos": photos, "seed": seed, "faces": faces, "format": "kohya"}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("LORA_DIFFUSION_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{server.rstrip('/')}/v1/loras", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            file: bytes = response.read()
            return file
    except urllib.error.HTTPError as error:
        raise ValueError(f"{server} refused: {detail(error.read()) or error.reason}") from None
    except OSError as error:
        raise ValueError(f"{server} cannot be reached ({error}). Is `lora-diffusion serve` running?") from error


def from_library(pixels_BHWC: np.ndarray, seed: int, faces: str, synthesizer: str) -> bytes:
    try:
        from lora_diffusion.lora.formats import to_bytes
    except ImportError as error:
        raise ValueError(
            f"without a server the LoRA is made here, and {error.name} is not installed: pip install 'lora-diffusion[torch]'"
        ) from error
    made = loaded(synthesizer)
    vector_N = made.from_photo(list(pixels_BHWC), seed=seed, faces=faces)[0]
    return to_bytes(vector_N, made.layout, "kohya", metadata=made.identity.metadata())


@functools.lru_cache(maxsize=1)
def loaded(synthesizer: str) -> Any:
    from lora_diffusion import Synthesizer

    return Synthesizer.from_pretrained(synthesizer)


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def detail(problem: bytes) -> str:
    """The sentence of a problem document (RFC 9457), or nothing."""
    try:
        return str(json.loads(problem)["detail"])
    except (ValueError, KeyError, TypeError):
        return ""


NODE_CLASS_MAPPINGS = {"LoRADiffusionFromPhoto": LoRADiffusionFromPhoto}
NODE_DISPLAY_NAME_MAPPINGS = {"LoRADiffusionFromPhoto": "LoRA from photo (LoRA Diffusion)"}
