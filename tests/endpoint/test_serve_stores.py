"""The endpoint whose LoRAs lie in a store: several gateways are one, and a store that fails is told and survived."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_endpoint import in_process
from redis_server import RedisServer
from serve_client import ADA, FAST, PROMPT, Client, problem, variant

from lora_diffusion.endpoint.graph import WithVectors
from lora_diffusion.endpoint.local import local_api
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.jobs.serve import Config, look_at_store
from lora_diffusion.serving.config import LibraryConfig, ServeConfig
from lora_diffusion.serving.library import open_library
from lora_diffusion.serving.services import Decoder


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def gateway(studio: Studio, library: LibraryConfig) -> Client:
    """Another one, with library and decoder of its own."""
    config = replace(studio.config, library=library)
    kept = open_library(config)
    decoder = Decoder(config, kept)
    stages: dict[str, Any] = {"library": kept, "decoder": decoder, "renderer": WithVectors(studio.renderer, decoder)}
    return variant(studio, stages=stages, library=library)


def test_one_gateway_makes_it_another_draws_and_deletes_it(studio: Studio, redis: RedisServer) -> None:
    config = LibraryConfig(store=redis.url)
    one, other = gateway(studio, config), gateway(studio, config)
    made = one.form("/v1/loras", seed=1, **{"latent_inference_steps": 3}).json()["loras"][0]
    drawn = other.json("/v1/images", lora=made["id"], prompt=PROMPT, num_inference_steps=3)
    assert drawn.status_code == 200, drawn.text
    assert other("GET", made["url"]).status_code == 200
    files = [each("GET", made["files"]["diffusers"]).content for each in (one, other)]
    assert files[0] == files[1]
    problem(other("DELETE", made["url"]), 403, "not_yours")
    assert other("DELETE", made["url"], headers={"X-Deletion-Token": made["deletion_token"]}).status_code == 204
    assert problem(one("GET", made["url"]), 404, "unknown_lora")["detail"] == "This LoRA was deleted. Make it again."


def test_a_store_that_is_down_is_a_documented_problem(studio: Studio, redis: RedisServer) -> None:
    client = gateway(studio, LibraryConfig(store=redis.url))
    made = client.form("/v1/loras", seed=1, **{"latent_inference_steps": 3}).json()["loras"][0]
    redis.kill()
    answers = [
        client.form("/v1/loras", **{"latent_inference_steps": 3}),
        client.form("/v1/personalize", ADA, prompt=PROMPT, **FAST),
        client("GET", made["url"]),
        client("DELETE", made["url"], headers={"X-Deletion-Token": made["deletion_token"]}),
        client.json("/v1/images", lora=made["id"], prompt=PROMPT),
        client.json("/v1/edits", lora=made["id"], edits={"age": 1}),
    ]
    for answer in answers:
        told = problem(answer, 503, "store_unavailable")
        assert told["detail"] == "The store of LoRAs cannot be used at the moment. Try again a little later."
        assert int(answer.headers["retry-after"]) >= 1
    assert client("GET", "/healthz").status_code == 200
    assert "store of LoRAs" in problem(client("GET", "/readyz"), 503, "not_ready")["detail"]
    told = client("GET", "/metrics").text
    assert f'lora_diffusion_problems_total{{reason="store_unavailable"}} {len(answers)}.0' in told
    with pytest.raises(
        ValueError, match=r"^the store of LoRAs at redis://127\.0\.0\.1:\d+/0 cannot be used: Error 111 "
    ):
        look_at_store(Config(library=LibraryConfig(store=redis.url)))
    redis.start()
    assert client("GET", "/readyz").status_code == 200
    assert client("GET", made["url"]).status_code == 200  # it was told to keep what it has


def test_redis_killed_and_started_again_under_load(synthesizer: Path, redis: RedisServer) -> None:
    """Whatever was answered 201 is there afterwards; all else was told 503 in time; nobody waits at /healthz."""
    library = LibraryConfig(store=redis.url, store_seconds=1.0)
    config = ServeConfig(synthesizer=str(synthesizer), library=library)
    made: list[dict[str, Any]] = []
    refused: list[float] = []
    health: list[float] = []
    stop = threading.Event()

    def load(address: str) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                started = time.monotonic()
                data = {"latent_inference_steps": "3"}
                answer = client.post("/v1/loras", files={"photo": ("x", ADA.read_bytes())}, data=data)
                if answer.status_code == 201:
                    made.append(answer.json()["loras"][0])
                else:
                    assert (answer.status_code, answer.json()["reason"]) == (503, "store_unavailable"), answer.text
                    refused.append(time.monotonic() - started)

    def look(address: str) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.wait(0.05):
                health.append(client.get("/healthz").elapsed.total_seconds())

    def until(condition: Any) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with in_process(local_api(config)) as address:
        workers = [threading.Thread(target=load, args=[address]) for _ in range(4)]
        workers.append(threading.Thread(target=look, args=[address]))
        for worker in workers:
            worker.start()
        try:
            for _ in range(2):
                before, down = len(made), len(refused)
                until(lambda before=before: len(made) > before + 8)
                redis.kill()
                until(lambda down=down: len(refused) > down + 8)
                redis.start()
                until(lambda: httpx.get(f"{address}/readyz", timeout=60).status_code == 200)
            before = len(made)
            until(lambda: len(made) > before + 8)
        finally:
            stop.set()
            for worker in workers:
                worker.join()
        assert all(httpx.get(f"{address}{one['url']}", timeout=60).status_code == 200 for one in made[before:])
    assert max(refused) < 5
    assert sorted(health)[len(health) // 2] < 0.5


def test_an_upload_that_is_too_large_to_keep_is_refused(studio: Studio, redis: RedisServer) -> None:
    client = gateway(studio, LibraryConfig(store=redis.url, max_upload_bytes=1000))
    file = client.form("/v1/loras", format="vector", **{"latent_inference_steps": 3}).content
    refused = client("POST", "/v1/loras", files={"lora_file": ("a.safetensors", file)})
    assert "library.max_upload_bytes" in problem(refused, 422, "bad_lora")["detail"]
