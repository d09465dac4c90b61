"""Laws of the endpoint on a real Ray Serve: what `serve run serve/app.py` deploys, asked over HTTP, loaded, broken, changed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from redis_server import RedisServer
from s3_server import free_port
from serve_world import save_synthesizer

ROOT = Path(__file__).parents[2]
PHOTO = (ROOT / "tests/data/faces/80000-0.png").read_bytes()
PROMPT = "a photo of sks person"
PATIENCE = 240.0  # seconds for anything: the machine may be busy
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Server:
    """The endpoint, deployed as `serve run` does: the file is read as YAML and handed to Serve's controller."""

    def __init__(self, synthesizer: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments: dict[str, Any] = {
            "synthesizer": str(synthesizer),
            "graph": "stages",
            "library.shards": 2,
            "limits.default_seconds": PATIENCE,
            "limits.max_in_flight": 12,
            "deployments.Renderer.autoscaling_config.max_replicas": 1,
        }
        self.user_config: dict[str, Any] = {}
        self.reloaded = ("Denoiser", "Decoder")

    def deploy(self) -> None:
        from ray.serve._private.api import serve_start
        from ray.serve.schema import ServeDeploySchema

        values = yaml.safe_load((ROOT / "serve/app.py").read_text())
        values["http_options"]["port"] = self.port
        application = values["applications"][0]
        application["args"] |= self.arguments
        if self.user_config:
            application["deployments"] = [{"name": name, "user_config": self.user_config} for name in self.reloaded]
        config = ServeDeploySchema.model_validate(values)
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config, _blocking=False)

    def wait_until(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError("waited in vain")

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200

    def model_id(self) -> str:
        model: str = httpx.get(f"{self.url}/v1/model", timeout=PATIENCE).json()["synthesizer"]["id"]
        return model

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(match[1]) if match else 0.0


@pytest.fixture(scope="module")
def server(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    server = Server(save_synthesizer(tmp_path_factory.mktemp("synthesizer")))
    server.deploy()
    server.wait_until(server.ready)
    yield server
    serve.shutdown()


def form(**fields: Any) -> dict[str, Any]:
    defaults = {"prompt": PROMPT, "num_inference_steps": 3, "latent_inference_steps": 3}
    return {"files": {"photo": ("p", PHOTO)}, "data": {key: str(value) for key, value in (defaults | fields).items()}}


async def ask(client: httpx.AsyncClient, server: Server, **fields: Any) -> httpx.Response:
    return await client.post(f"{server.url}/v1/personalize", **form(**fields))


async def ask_together(server: Server, count: int, **fields: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        return await asyncio.gather(*(ask(client, server, **fields) for _ in range(count)))


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment, among this test's own children."""
    ours = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::")]
    return [process for process in ours if f"lora-diffusion:{deployment}" in " ".join(process.cmdline())]


def replica(deployment: str) -> psutil.Process:
    found = replicas(deployment)
    assert found, f"no replica of {deployment}"
    return found[0]


def test_photo_goes_in_and_picture_and_lora_come_out(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/personalize", timeout=PATIENCE, **form(seed=1, image_seed=2, format="diffusers")
    )
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    file = httpx.get(f"{server.url}{whole['lora']['files']['peft']}", timeout=PATIENCE)
    assert file.content[:2] == b"PK"
    again = httpx.post(f"{server.url}/v1/images", timeout=PATIENCE, **form(seed=1, image_seed=2)).json()
    assert again["images"][0]["data"] == whole["images"][0]["data"]
    url = f"{server.url}{whole['lora']['url']}"
    for made in (whole, again):  # it stays until all who made it have deleted it
        assert httpx.get(url, timeout=PATIENCE).status_code == 200
        token = {"X-Deletion-Token": made["lora"]["deletion_token"]}
        assert httpx.delete(url, headers=token, timeout=PATIENCE).status_code == 204
    assert httpx.get(url, timeout=PATIENCE).json()["reason"] == "unknown_lora"


def test_errors_of_the_stages_keep_their_reason_across_processes(server: Server) -> None:
    bad = httpx.post(f"{server.url}/v1/loras", files={"photo": ("p", b"no photo")}, timeout=PATIENCE)
    assert (bad.status_code, bad.json()["reason"]) == (422, "not_an_image")
    stale = {"values": [0.0] * 16, "model": "0" * 16}
    answer = httpx.post(f"{server.url}/v1/loras", json={"latent": stale}, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["reason"]) == (409, "stale_latent")
    huge = httpx.post(
        f"{server.url}/v1/loras",
        content=b"x" * 30_000_000,
        headers={"content-type": "application/json"},
        timeout=PATIENCE,
    )
    assert huge.status_code == 413


@pytest.mark.parametrize("seconds", ["2", "4"])
def test_deadline_is_answered_by_us_and_not_by_the_proxy(server: Server, seconds: str) -> None:
    headers = {"X-Request-Timeout-Seconds": seconds, "X-Request-ID": "abc"}
    many = form(num_images=8, num_inference_steps=100, guidance_scale=3)
    late = httpx.post(f"{server.url}/v1/images", headers=headers, timeout=PATIENCE, **many)
    assert (late.status_code, late.json()["reason"]) == (504, "deadline_exceeded")
    assert late.headers.get_list("x-request-id") == ["abc"]  # Serve puts it there, too
    for senseless in ("abc", "-1"):
        answer = httpx.get(f"{server.url}/v1/model", headers={"X-Request-Timeout-Seconds": senseless}, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["reason"]) == (422, "invalid_request")


def test_events_arrive_while_the_picture_is_drawn(server: Server) -> None:
    arrivals: dict[str, float] = {}
    with httpx.stream(
        "POST",
        f"{server.url}/v1/images",
        headers={"Accept": "text/event-stream"},
        timeout=PATIENCE,
        **form(num_inference_steps=30),
    ) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                arrivals.setdefault(line.removeprefix("event: "), time.monotonic())
    assert list(arrivals) == ["lora", "progress", "image", "done"]
    assert arrivals["image"] - arrivals["progress"] > 0.02  # not all at once at the end


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_client_that_leaves_stops_the_drawing(server: Server, accept: str) -> None:
    drawn = 'lora_diffusion_stage_batch_size_count{stage="renderer"}'
    alone = 'lora_diffusion_stage_batch_size_bucket{le="1.0",stage="renderer"}'
    request = httpx.stream(
        "POST",
        f"{server.url}/v1/images",
        headers={"Accept": accept},
        timeout=httpx.Timeout(PATIENCE, read=3.0),
        **form(num_images=8, num_inference_steps=100, guidance_scale=3),
    )
    with contextlib.suppress(httpx.ReadTimeout), request as response:
        next(response.iter_lines())  # leave at the first event, or, as none comes for JSON, after three seconds
    server.wait_until(lambda: server.metric("lora_diffusion_requests_in_flight") == 0)
    before = server.metric(drawn), server.metric(alone)
    assert httpx.post(f"{server.url}/v1/images", timeout=PATIENCE, **form()).status_code == 200
    assert server.metric(drawn) == before[0] + 1
    assert server.metric(alone) == before[1] + 1  # nobody else was in the batch any more


def test_overload_is_answered_at_once_and_passes(server: Server) -> None:
    """More than twice what the gateway holds, and what the proxy may queue: all are answered, by us, and told when to come back."""
    answers = asyncio.run(ask_together(server, 30))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["reason"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    assert sum(answer.status_code == 200 for answer in answers) >= 12
    assert asyncio.run(ask_together(server, 1))[0].status_code == 200


@pytest.mark.parametrize("deployment", ["Renderer", "Embedder"])
def test_killed_replica_costs_no_request(server: Server, deployment: str) -> None:
    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            first = [asyncio.create_task(ask(client, server, num_inference_steps=40)) for _ in range(4)]
            await asyncio.sleep(1.0)
            os.kill(replica(deployment).pid, signal.SIGKILL)
            return await asyncio.gather(*first, *(ask(client, server) for _ in range(4)))

    answers = asyncio.run(scenario())
    assert [answer.status_code for answer in answers] == [200] * 8, [answer.text[:200] for answer in answers]


def test_killed_shard_loses_its_loras_alone_and_says_so(server: Server) -> None:
    def make(seed: int) -> str:
        fields = {"files": {"photo": ("p", PHOTO)}, "data": {"seed": str(seed), "latent_inference_steps": "3"}}
        made: str = httpx.post(f"{server.url}/v1/loras", timeout=PATIENCE, **fields).json()["loras"][0]["id"]
        return made

    ids: list[str] = []
    while len({int(lora_id[:8], 16) % 2 for lora_id in ids}) < 2 or len(ids) < 8:  # some in either shard
        ids.append(make(len(ids)))
        assert len(ids) < 64
    lost = {lora_id for lora_id in ids if int(lora_id[:8], 16) % 2 == 0}
    assert len(set(ids)) == len(ids)
    process = replica("Library-0")
    process.kill()
    server.wait_until(lambda: not psutil.pid_exists(process.pid))
    for lora_id in ids:
        answer = httpx.get(f"{server.url}/v1/loras/{lora_id}", timeout=PATIENCE)
        if lora_id in lost:
            assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_lora")
            assert re.search(r"more than .* ago, it was lost when this part of the service", answer.json()["detail"])
        else:
            assert answer.status_code == 200, answer.text
    assert make(0) == ids[0]  # the same request makes it again
    assert httpx.get(f"{server.url}/v1/loras/{ids[0]}", timeout=PATIENCE).status_code == 200


def test_slow_uploads_hold_up_nobody(server: Server) -> None:
    async def scenario() -> int:
        writers = []
        for i in range(8):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = b"POST /v1/loras HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            writer.write(head if i % 2 else head[: 20 + i])  # within the body, or within the headers
            writers.append(writer)
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            answer = await ask(client, server)
        for writer in writers:
            writer.close()
        return answer.status_code

    assert asyncio.run(scenario()) == 200


class Load:
    """Requests one after the other, in a thread, until told to stop."""

    def __init__(self, server: Server) -> None:
        self.answers: list[httpx.Response] = []
        self._stop = threading.Event()
        self._server = server
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def _run(self) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not self._stop.is_set():
                self.answers.append(client.post(f"{self._server.url}/v1/personalize", **form()))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def lost(self) -> list[str]:
        return [f"{a.status_code} {a.text[:500]}" for a in self.answers if a.status_code != 200]


def test_another_synthesiser_is_loaded_without_restart_and_without_a_gap(server: Server, tmp_path: Path) -> None:
    before = server.model_id()
    processes = {name: replica(name).pid for name in ("Denoiser", "Decoder")}
    latent = httpx.post(f"{server.url}/v1/latents", timeout=PATIENCE, json={"embedding": [1.0] * 512}).json()[
        "latents"
    ][0]["latent"]
    server.user_config = {"synthesizer": str(save_synthesizer(tmp_path / "new", seed=1))}
    with Load(server) as load:
        server.deploy()
        server.wait_until(lambda: server.model_id() != before)
    assert load.answers
    assert not load.lost
    assert {name: replica(name).pid for name in processes} == processes
    # what a client kept from before still finds its decoder
    assert httpx.post(f"{server.url}/v1/loras", timeout=PATIENCE, json={"latent": latent}).status_code == 201


def test_new_version_takes_over_without_a_lost_request(server: Server) -> None:
    """Other limits restart the replicas: the old ones finish what they have, the new ones take what comes."""
    process = replica("Gateway").pid
    server.arguments["limits.max_images"] = 3
    with Load(server) as load:
        server.deploy()
        server.wait_until(lambda: not psutil.pid_exists(process))
        server.wait_until(server.ready)
    assert load.answers
    assert not load.lost
    refused = httpx.post(f"{server.url}/v1/personalize", timeout=PATIENCE, **form(num_images=4))
    assert refused.status_code == 422


def test_the_fused_graph_draws_and_reloads(server: Server, tmp_path: Path) -> None:
    """From now on two processes do what seven did."""
    old = [replica(name).pid for name in ("Embedder", "Denoiser", "Decoder", "Library-0", "Library-1")]
    server.arguments["library.shards"] = 1
    server.arguments["graph"], server.reloaded = "fused", ("Gateway",)
    server.deploy()
    server.wait_until(lambda: not any(psutil.pid_exists(pid) for pid in old))
    server.wait_until(server.ready)
    before = server.model_id()
    made = httpx.post(f"{server.url}/v1/loras", timeout=PATIENCE, files={"photo": ("p", PHOTO)}).json()["loras"][0]
    wanted = {"lora": made["id"], "prompt": PROMPT, "num_inference_steps": 3}
    drawn = httpx.post(f"{server.url}/v1/images", timeout=PATIENCE, json=wanted)
    assert drawn.status_code == 200, drawn.text
    server.user_config = {"synthesizer": str(save_synthesizer(tmp_path / "other", seed=2))}
    process = replica("Gateway").pid
    server.deploy()
    server.wait_until(lambda: server.model_id() != before)
    assert replica("Gateway").pid == process
    again = httpx.post(f"{server.url}/v1/images", timeout=PATIENCE, json=wanted)
    assert again.status_code == 200, again.text  # made by the synthesiser before, which is still there


def test_two_fused_gateways_share_a_store_and_no_death_loses_a_lora(server: Server, tmp_path: Path) -> None:
    """Comes last. Each asks on its own connection, so that both gateways are met."""
    store = RedisServer(tmp_path)
    store.start()
    try:
        old = replica("Gateway").pid
        server.arguments |= {"library.store": store.url, "deployments.Gateway.num_replicas": 2}
        server.deploy()
        server.wait_until(lambda: not psutil.pid_exists(old))
        server.wait_until(lambda: server.ready() and len(replicas("Gateway")) == 2)
        made = []
        for seed in range(6):
            fields = {"files": {"photo": ("p", PHOTO)}, "data": {"seed": str(seed), "latent_inference_steps": "3"}}
            made.append(httpx.post(f"{server.url}/v1/loras", timeout=PATIENCE, **fields).json()["loras"][0])
        for one in made * 2:
            assert httpx.get(f"{server.url}{one['url']}", timeout=PATIENCE).status_code == 200
        for process in replicas("Gateway"):
            process.kill()
        server.wait_until(server.ready)
        for one in made:
            token = {"X-Deletion-Token": one["deletion_token"]}
            assert httpx.delete(f"{server.url}{one['url']}", headers=token, timeout=PATIENCE).status_code == 204
            assert "was deleted" in httpx.get(f"{server.url}{one['url']}", timeout=PATIENCE).text
    finally:
        store.kill()
