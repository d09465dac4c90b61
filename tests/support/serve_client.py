"""The HTTP API with all stages in this process, and a client of it: what the tests of the endpoint share."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_world import save_synthesizer

from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.local import local_studio
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import LimitsConfig, ServeConfig

FACES = Path(__file__).parents[1] / "data" / "faces"
ADA, ADA_AGAIN, BOB = (FACES / name for name in ("80000-0.png", "80000-1.png", "80001-1.png"))
PROMPT = "a photo of sks person"
FAST = {"num_inference_steps": 3, "latent_inference_steps": 3}


@pytest.fixture(scope="session")
def synthesizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("synthesizer"))


@pytest.fixture(scope="session")
def studio(synthesizer: Path) -> Studio:
    limits = LimitsConfig(
        max_body_bytes=2_000_000, max_pixels=4_000_000, body_seconds=1.0, max_images=4, default_seconds=300.0
    )
    return local_studio(ServeConfig(synthesizer=str(synthesizer), limits=limits))


LOOP = asyncio.new_event_loop()  # one for all, as the stages work in it


class Client:
    """Calls the API. root_path: what a server puts before its paths, as Serve does with its route_prefix."""

    def __init__(self, studio: Studio, root_path: str = "") -> None:
        self.loop = LOOP
        self.app = build_api(studio)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=root_path)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.client.request(method, path, **options))

    def form(
        self, path: str, photo: Path | bytes = ADA, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        data = photo if isinstance(photo, bytes) else photo.read_bytes()
        return self("POST", path, files={"photo": ("x", data)}, data=fields, headers=headers)

    def json(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return self("POST", path, json=fields, headers=headers)


def variant(studio: Studio, root_path: str = "", stages: dict[str, Any] | None = None, **changes: Any) -> Client:
    """The same stages, or others, behind another configuration."""
    names = ("embedder", "denoiser", "decoder", "renderer", "library")
    kept = {name: getattr(studio, name) for name in names} | (stages or {})
    return Client(Studio(replace(studio.config, **changes), studio.metrics, **kept), root_path)


@pytest.fixture(scope="session")
def api(studio: Studio) -> Iterator[Client]:
    client = Client(studio)
    yield client
    client.loop.run_until_complete(client.client.aclose())


def pixels(response_data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(response_data))).convert("RGB"))


def problem(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["reason"] == reason, document
    assert document["status"] == status
    assert document["detail"]
    return document


def latent_of(api: Client, photo: Path = ADA) -> dict[str, Any]:
    answer = api.form("/v1/latents", photo, seed=1, latent_inference_steps=3).json()
    latent: dict[str, Any] = answer["latents"][0]["latent"]
    return latent
