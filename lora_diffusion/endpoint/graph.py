"""The graph on Ray Serve. `graph: stages`: a gateway, four stages that scale each by its own load, and the library.

photo ─► Gateway ─► Embedder ─► Denoiser ─► Decoder ─► Library (codes)
                        ▲                      ▲
                        └────── scores ──── Renderer ─► pictures

`graph: fused`: two processes, for models so small that a call from process to process costs more than the work.

photo ─► Gateway with embedder, denoiser, decoder and library ─► vector ─► Renderer with an embedder ─► pictures

With `library.store` gateways and decoders ask that store, and there is no Library.

serve run serve/app.py                                   # configs/serve_tiny.yaml
serve run lora_diffusion.endpoint.graph:build config=configs/serve_sd15.yaml limits.max_images=4
"""

from __future__ import annotations

import os
import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle

from lora_diffusion.config import load_config, placed
from lora_diffusion.endpoint.access import read_keys, refuse_open_door
from lora_diffusion.endpoint.announce import announced
from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.local import local_stages
from lora_diffusion.endpoint.logs import set_up_logs
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.remote import remote
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.batcher import Timing
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.faces import Embedder
from lora_diffusion.serving.library import Library, ShardedLibrary, open_library
from lora_diffusion.serving.messages import DrawnImage, DrawTask, LoRARecord, Progress
from lora_diffusion.serving.services import Decoder, Denoiser, Renderer
from lora_diffusion.serving.stages import DecoderStage, LibraryStage, RendererStage

DEFAULT_CONFIG = "configs/serve_tiny.yaml"
ENVIRONMENT = "LORA_DIFFUSION_SERVE"


@serve.ingress()
class Gateway:
    """HTTP in, HTTP out; all work is done behind the handles."""

    def __init__(
        self, config: ServeConfig, libraries: Sequence[DeploymentHandle[Any]], **stages: DeploymentHandle[Any]
    ) -> None:
        refuse_to_listen(config)
        set_up_logs(config.log_requests)
        self._studio = Studio(
            config,
            Metrics(),
            embedder=remote(Embedder, stages["embedder"]),
            denoiser=remote(Denoiser, stages["denoiser"]),
            decoder=remote(Decoder, stages["decoder"]),
            renderer=remote(Renderer, stages["renderer"]),
            library=library_of(config, libraries),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return announced(build_api(self._studio, echo_request_id=False), self._studio)


@serve.ingress()
class FusedGateway:
    """HTTP in, HTTP out, and all that leads to a LoRA: each stage in a thread of its own. One replica, unless a store holds the LoRAs."""

    def __init__(self, config: ServeConfig, renderer: DeploymentHandle[Any]) -> None:
        refuse_to_listen(config)
        set_up_logs(config.log_requests)
        self._stages = local_stages(config)
        drawing = WithVectors(remote(Renderer, renderer), self._stages["decoder"])
        self._studio = Studio(config, Metrics(), renderer=drawing, **self._stages)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return announced(build_api(self._studio, echo_request_id=False), self._studio)

    async def reconfigure(self, options: Mapping[str, Any]) -> None:
        """Serve calls this with `user_config`, as the stages'."""
        for name in ("decoder", "denoiser"):  # in this order: then no code comes before who decodes it
            await self._stages[name].reconfigure(options)


class WithVectors:
    """A renderer that gets each LoRA as its vector (4 N bytes) and needs no decoder."""

    def __init__(self, renderer: RendererStage, decoder: DecoderStage) -> None:
        self._renderer, self._decoder = renderer, decoder

    async def draw(self, task: DrawTask, deadline: float) -> AsyncGenerator[Progress | DrawnImage | Timing, None]:
        record = LoRARecord(vector_N=await self._decoder.vector(task.lora_id, task.record, deadline))
        async with aclosing(self._renderer.draw(replace(task, record=record), deadline)) as events:
            async for event in events:
                yield event

    async def describe(self) -> dict[str, Any]:
        return await self._renderer.describe()

    async def ready(self) -> bool:
        return await self._renderer.ready()


class FusedRenderer(Renderer):
    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, None, Embedder(config))


class DecoderReplica(Decoder):
    def __init__(self, config: ServeConfig, libraries: Sequence[DeploymentHandle[Any]]) -> None:
        super().__init__(config, library_of(config, libraries))


class RendererReplica(Renderer):
    def __init__(self, config: ServeConfig, decoder: DeploymentHandle[Any], embedder: DeploymentHandle[Any]) -> None:
        super().__init__(config, remote(Decoder, decoder), remote(Embedder, embedder))


def library_of(config: ServeConfig, libraries: Sequence[DeploymentHandle[Any]]) -> LibraryStage:
    """The deployments that hold LoRAs in memory, or the store."""
    shards = [remote(Library, library) for library in libraries]
    return ShardedLibrary(shards) if shards else open_library(config)


def refuse_to_listen(config: ServeConfig) -> None:
    """Raises ValueError where the Serve of this process, if there is one yet, listens to strangers, and there are no keys."""
    if not ray.is_initialized():
        return
    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    options: Any = ray.get(controller.get_http_config.remote())
    refuse_open_door(config.access, options.host or "127.0.0.1")


def build(arguments: dict[str, Any]) -> Application:
    """The application. `config`: a YAML file; any other argument overrides a key of it, as in `limits.max_images: 4`.

    `serve run` hands no arguments to a config file, so the environment variable LORA_DIFFUSION_SERVE may hold more of
    them, as words: "synthesizer=runs/tiny/training/synthesizer library.ttl_seconds=600".
    """
    words = shlex.split(os.environ.get(ENVIRONMENT, ""))
    given = {**arguments, **{key: value for key, _, value in (word.partition("=") for word in words)}}
    path = given.pop("config", None) or DEFAULT_CONFIG
    overrides = [f"{key}={value}" for key, value in given.items()]
    config = placed(load_config(ServeConfig, path, overrides))
    options = config.deployments
    settings = replace(config, deployments={})  # so that nobody restarts because somebody else scales differently
    # a rolling update may find all replicas of a stage new: whoever has a request in hand waits for them as it does
    patience = {"graceful_shutdown_timeout_s": config.limits.max_seconds}

    def bind(name: str, deployed: Any, **arguments: Any) -> Application:
        deployment: Any = serve.deployment(deployed)
        deployed_as = patience | options.get(name.partition("-")[0], {})
        bound: Application = deployment.options(name=name, **deployed_as).bind(settings, **arguments)
        return bound

    read_keys(config.access)  # refused here, and not in a replica that is started again and again
    refuse_to_listen(config)
    if unknown := sorted(set(options) - DEPLOYMENTS):
        raise ValueError(f"deployments: there is no {unknown[0]!r}; there are {', '.join(sorted(DEPLOYMENTS))}")
    shards = config.library.shards
    if config.library.store:
        open_library(config)
    elif config.graph == "fused" and (shards > 1 or options.get("Gateway", {}).get("num_replicas") != 1):
        raise ValueError(
            "graph=fused keeps the library in the gateway: set deployments.Gateway.num_replicas=1, or graph=stages, "
            "or library.store, which several share; library.shards are for graph=stages"
        )
    elif options.get("Library", {}).get("num_replicas", 1) != 1 or "autoscaling_config" in options.get("Library", {}):
        raise ValueError("a second replica of Library would hold other LoRAs: set library.shards=2, or library.store")
    if config.graph == "fused":
        return bind("Gateway", FusedGateway, renderer=bind("Renderer", FusedRenderer))
    names = ["Library"] if shards == 1 else [f"Library-{i}" for i in range(shards)]
    libraries = [] if config.library.store else [bind(name, Library) for name in names]
    embedder = bind("Embedder", Embedder)
    decoder = bind("Decoder", DecoderReplica, libraries=libraries)
    return bind(
        "Gateway",
        Gateway,
        embedder=embedder,
        denoiser=bind("Denoiser", Denoiser),
        decoder=decoder,
        renderer=bind("Renderer", RendererReplica, decoder=decoder, embedder=embedder),
        libraries=libraries,
    )


DEPLOYMENTS = {"Gateway", "Embedder", "Denoiser", "Decoder", "Renderer", "Library"}
