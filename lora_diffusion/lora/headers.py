"""What user interfaces read in the header of a LoRA file: which base model, what to write in the prompt, what it is called.

`ss_*`: kohya's sd-scripts, read by A1111, Forge, SD.Next and Lora Manager. `modelspec.*`: Stability's ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec), read by ComfyUI, SwarmUI and InvokeAI.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

from lora_diffusion.lora import dialects
from lora_diffusion.lora.layout import LoRALayout

TRIGGER = "sks person"
"""The words that every fine-tuning of this package ties to the person, unless its prompt says otherwise."""

# version as kohya writes it, architecture, resolution
_MODELS = {
    "sd1": ("sd_v1", "stable-diffusion-v1", "512x512"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512", ""),  # 2.1 has 768; the layers do not tell
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"),
    "refiner": ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner", "1024x1024"),
}


def for_programs(layout: LoRALayout, metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """Entries made of the layers and of the caller's words: `identity`, `base_model`, `trigger`, `licence`, `date`.

    name: of the file, where `metadata` has no identity. A UNet of a family of its own counts as Stable Diffusion 1.x, whose
    layers it has. The date is today's, in UTC, unless given.
    """
    model = family(layout)
    version, architecture, resolution = _MODELS.get(model, ("sd_v1", "stable-diffusion-v1", ""))
    name = metadata.get("identity") or name
    trigger = metadata.get("trigger", TRIGGER)
    entries = {
        "ss_base_model_version": version,
        "ss_v2": str(model == "sd2"),
        "ss_sd_model_name": metadata.get("base_model", ""),
        "ss_output_name": re.sub(r"[^\w .-]+", "_", name),  # A1111 makes <lora:NAME:1> of it
        "ss_tag_frequency": json.dumps({"photos": {trigger: 1}}) if trigger else "",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": resolution,
        "modelspec.date": metadata.get("date") or datetime.now(UTC).date().isoformat(),
        "modelspec.license": metadata.get("licence", ""),
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"write '{trigger}' in the prompt" if trigger else "",
    }
    return {key: value for key, value in entries.items() if value}


@lru_cache(maxsize=64)
def family(layout: LoRALayout) -> str:
    """A key of `dialects.FAMILIES`, or "" where the layers do not tell."""
    return dialects.family({entry.name.replace(".", "_"): entry.in_features for entry in layout.entries})
