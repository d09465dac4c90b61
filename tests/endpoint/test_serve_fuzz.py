"""Whatever the OpenAPI description allows, and what it forbids: no 5xx, no hang, and every refusal is a problem document."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from s3_server import free_port
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_world import save_synthesizer

from lora_diffusion.endpoint.local import local_api
from lora_diffusion.serving.config import LimitsConfig, ServeConfig

OPERATIONS = (
    ("/v1/embeddings", "POST"),
    ("/v1/latents", "POST"),
    ("/v1/loras", "POST"),
    ("/v1/loras/{lora_id}", "GET"),
    ("/v1/loras/{lora_id}", "DELETE"),
    ("/v1/images", "POST"),
    ("/v1/personalize", "POST"),
    ("/v1/edits", "POST"),
    ("/v1/interpolations", "POST"),
    ("/v1/likeness", "POST"),
    ("/v1/model", "GET"),
)
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 12
SECONDS = 60.0  # for one answer: a hang is a failure


class Live:
    """The API over HTTP, in a thread of this process."""

    def __init__(self, synthesizer: Path) -> None:
        limits = LimitsConfig(max_images=2, max_inference_steps=3, max_samples=2, max_body_bytes=1_000_000)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.app = local_api(ServeConfig(synthesizer=str(synthesizer), limits=limits))
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=port, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(save_synthesizer(tmp_path_factory.mktemp("synthesizer")))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def description(live: Live) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{live.url}/openapi.json").json())


def test_description_covers_every_route(description: Any) -> None:
    described = {(path, method.upper()) for path in description for method in description[path]}
    assert {operation for operation in described if operation[0].startswith("/v1/")} == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_breaks_the_server(live: Live, description: Any, path: str, method: str, mode: Any) -> None:
    if mode is GenerationMode.NEGATIVE and path == "/v1/model":
        return  # it takes nothing that could be wrong

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.headers.pop("X-Request-Timeout-Seconds", None)  # or some are late, which is 504 and right
        answer = case.call(base_url=live.url, timeout=SECONDS)
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, checks=CHECKS)  # as described: status, media type, fields
        if answer.status_code >= 400:
            assert answer.headers["content-type"][0] == "application/problem+json"
            assert {"type", "title", "status", "detail", "reason"} <= set(answer.json())

    check()
    assert httpx.get(f"{live.url}/readyz", timeout=SECONDS).status_code == 200
