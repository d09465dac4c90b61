"""LoRA Diffusion: one photo of a face in, a LoRA for Stable Diffusion out (arXiv:2412.02352).

>>> from lora_diffusion import Synthesizer, save_lora
>>> synthesizer = Synthesizer.from_pretrained("tiny")
>>> vectors_BN = synthesizer.from_photo("ada.jpg")
>>> save_lora(vectors_BN[0], synthesizer.layout, "ada.safetensors")

The names below are the public API; whatever else this package holds may change. They are loaded when first used, so that
`import lora_diffusion` costs nothing; they need `pip install 'lora-diffusion[torch]'`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diffusion.corpus import CorpusReader as CorpusReader
    from lora_diffusion.faces.embedder import FaceEmbedder as FaceEmbedder
    from lora_diffusion.lora.bank import LoRABank as LoRABank
    from lora_diffusion.lora.formats import load as load_lora
    from lora_diffusion.lora.formats import save as save_lora
    from lora_diffusion.lora.layout import LoRALayout as LoRALayout
    from lora_diffusion.lora.rendering import render as render
    from lora_diffusion.models.stable_diffusion import BaseModel as BaseModel
    from lora_diffusion.synthesis.synthesizer import Synthesizer as Synthesizer

__version__ = "0.1.0"

# Nothing here reports to others: onnxruntime would note this machine in the home directory, and Ray what runs on it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_PUBLIC = {
    "BaseModel": ("models.stable_diffusion", "BaseModel"),
    "CorpusReader": ("corpus", "CorpusReader"),
    "FaceEmbedder": ("faces.embedder", "FaceEmbedder"),
    "LoRABank": ("lora.bank", "LoRABank"),
    "LoRALayout": ("lora.layout", "LoRALayout"),
    "Synthesizer": ("synthesis.synthesizer", "Synthesizer"),
    "load_lora": ("lora.formats", "load"),
    "render": ("lora.rendering", "render"),
    "save_lora": ("lora.formats", "save"),
}
__all__ = [
    "BaseModel",
    "CorpusReader",
    "FaceEmbedder",
    "LoRABank",
    "LoRALayout",
    "Synthesizer",
    "load_lora",
    "render",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lora_diffusion' has no attribute {name!r}; there are {', '.join(__all__)}")
    from lora_diffusion.extras import needs

    module, attribute = _PUBLIC[name]
    with needs("torch"):
        value = getattr(importlib.import_module(f"lora_diffusion.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
