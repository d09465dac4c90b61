"""All stages in this process, without Ray: the same services, the same routes. For tests, notebooks and small tools."""

from __future__ import annotations

from fastapi import FastAPI

from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.faces import Embedder
from lora_diffusion.serving.library import Library
from lora_diffusion.serving.services import Decoder, Denoiser, Renderer


def local_studio(config: ServeConfig) -> Studio:
    """A studio whose stages are objects here. Work runs in one thread for each stage."""
    library, embedder = Library(config), Embedder(config)
    decoder = Decoder(config, library)
    return Studio(
        config,
        Metrics(),
        embedder=embedder,
        denoiser=Denoiser(config),
        decoder=decoder,
        renderer=Renderer(config, decoder, embedder),
        library=library,
    )


def local_api(config: ServeConfig) -> FastAPI:
    """`uvicorn.run(local_api(ServeConfig()))` serves it."""
    return build_api(local_studio(config))
