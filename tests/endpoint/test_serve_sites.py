"""Other sites, and clients that are slow or leave: a browser is not made to ask for a stranger, and nobody keeps others out."""

from __future__ import annotations

import json
import logging
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest
from http_endpoint import in_process
from serve_client import FAST, PROMPT, Client, problem, variant

from lora_diffusion.endpoint.access import SLOW_BODIES
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import AccessConfig

BODY_SECONDS = 30.0
LATENTS = "/v1/latents"
BODY = {"embedding": [1.0] * 512, "latent_inference_steps": 3}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "192.168.1.7"]
)
def test_addresses_and_localhost_are_answered(api: Client, host: str) -> None:
    assert api("GET", "/v1/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_somebody_pointed_here_is_not(api: Client, studio: Studio, host: str) -> None:
    for path in ("/v1/model", "/", "/healthz"):
        problem(api("GET", path, headers={"Host": host}), 421, "wrong_host")
    named = variant(studio, access=AccessConfig(allowed_hosts=("EVIL.example", "other.example")))
    assert (named("GET", "/healthz", headers={"Host": host}).status_code == 200) == host.startswith("evil.example")
    anyone = variant(studio, access=AccessConfig(allowed_hosts=("*",)))
    assert anyone("GET", "/healthz", headers={"Host": host}).status_code == 200


def test_who_has_a_key_may_use_any_name(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIFFUSION_API_KEYS", "a")
    headers = {"Host": "lora.example", "X-API-Key": "a"}
    assert variant(studio)("GET", "/v1/model", headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["https://shop.example", "null", "http://127.0.0.1:9999", "http://localhost", ""])
def test_a_page_of_another_site_changes_nothing_here(api: Client, studio: Studio, origin: str) -> None:
    headers = {"Origin": origin}
    problem(api.form("/v1/loras", headers=headers), 403, "foreign_origin")  # a form needs no leave of CORS
    problem(api("DELETE", f"/v1/loras/{'0' * 32}", headers=headers), 403, "foreign_origin")
    allowed = variant(studio, access=AccessConfig(cors_origins=(origin,)))
    assert allowed.json(LATENTS, headers, **BODY).status_code == 200


def test_its_own_page_may_ask(api: Client) -> None:
    for host in ("127.0.0.1:8000", "localhost:8000"):
        for scheme in ("http", "https"):  # behind a proxy that ends TLS
            assert api.json(LATENTS, {"Host": host, "Origin": f"{scheme}://{host}"}, **BODY).status_code == 200


def test_nothing_of_a_person_is_kept_on_the_way(api: Client) -> None:
    made = api.form("/v1/loras", latent_inference_steps=3)
    answers = [
        made,
        api("GET", made.json()["loras"][0]["files"]["kohya"]),
        api("GET", made.json()["loras"][0]["url"]),
        api.form("/v1/embeddings"),
        api.form("/v1/images", headers={"Accept": "image/png"}, prompt=PROMPT, **FAST),
        api.form("/v1/personalize", headers={"Accept": "text/event-stream"}, prompt=PROMPT, **FAST),
        api.form("/v1/loras", b"no photo"),
        api("GET", "/v1/loras/x"),
    ]
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}


@pytest.fixture
def live(studio: Studio) -> Iterator[str]:
    limits = replace(studio.config.limits, body_seconds=BODY_SECONDS)
    with in_process(variant(studio, limits=limits).app) as address:
        yield address


def connect(address: str, text: str) -> socket.socket:
    url = urlsplit(address)
    connection = socket.create_connection((url.hostname, url.port))
    connection.sendall(text.replace("\n", "\r\n").encode())
    return connection


def test_a_client_that_leaves_is_no_error_of_ours(
    live: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("lora_diffusion.serve")
    monkeypatch.setattr(log, "propagate", True)  # also after an endpoint's own set-up
    head = "POST /v1/loras HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\nContent-Length: 1000\n\n"
    with caplog.at_level("INFO"):
        connect(live, head + "{").close()
        drawing = {"prompt": PROMPT, "embedding": [1.0] * 512, "num_inference_steps": 100, "num_images": 4}
        body = json.dumps(drawing)
        for accept in ("application/json", "text/event-stream"):
            head = f"POST /v1/images HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\nAccept: {accept}\n"
            connection = connect(live, f"{head}Content-Length: {len(body)}\n\n{body}")
            time.sleep(0.2)  # it is being drawn
            connection.close()
        deadline = time.monotonic() + 30
        while len(_requests(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(_requests(caplog)) == 3
    assert [r.getMessage() for r in caplog.records if r.levelname in ("ERROR", "CRITICAL", "WARNING")] == []


def _requests(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "lora_diffusion.serve"]
    return [line for line in lines if line["event"] == "request"]


def test_slow_bodies_of_one_client_end_soon_and_others_are_answered(live: str) -> None:
    """300 of them would hold all room of the proxy in front until their time is up; so many as end at once, and eight stay."""
    head = "POST /v1/loras HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\nContent-Length: 1000\n\n"
    connections = [connect(live, head + "{") for _ in range(SLOW_BODIES + 30)]
    deadline = time.monotonic() + BODY_SECONDS / 2
    assert httpx.post(live + LATENTS, json=BODY, timeout=30).status_code == 200
    ended: list[socket.socket] = []
    while len(ended) < 30 and time.monotonic() < deadline:
        ended = select.select(connections, [], [], 0.1)[0]
    assert len(ended) == 30
    assert all(connection.recv(65536).startswith(b"HTTP/1.1 408") for connection in ended)
    for connection in connections:
        connection.close()
