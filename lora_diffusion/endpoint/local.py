"""All stages in this process, without Ray: the same services, the same routes. For tests, notebooks and small tools."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.faces import Embedder
from lora_diffusion.serving.library import open_library
from lora_diffusion.serving.services import Decoder, Denoiser, Renderer


def local_stages(config: ServeConfig) -> dict[str, Any]:
    """All that leads to a LoRA, by name: embedder, denoiser, decoder, library. Each works in a thread of its own."""
    library = open_library(config)
    return {
        "embedder": Embedder(config),
        "denoiser": Denoiser(config),
        "decoder": Decoder(config, library),
        "library": library,
    }


def local_studio(config: ServeConfig) -> Studio:
    """A studio whose stages are objects here."""
    stages = local_stages(config)
    renderer = Renderer(config, stages["decoder"], stages["embedder"])
    return Studio(config, Metrics(), renderer=renderer, **stages)


def local_api(config: ServeConfig) -> FastAPI:
    """`uvicorn.run(local_api(ServeConfig()))` serves it."""
    return build_api(local_studio(config))
