"""The endpoint's page in a real Chromium: `browser`, and what several tests do with a page. Skipped where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PEOPLE = Path(__file__).parents[2] / "lora_diffusion/endpoint/static/people"
PHOTO = PEOPLE / "80512.jpg"
SOON = 120_000  # ms, on a busy machine
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
# A camera that shows a test picture, and the permission to use it.
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # Chromium refuses to sandbox itself for root
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=[*sandbox, *CAMERA])
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


def ready(page: Any, pictures: int = 4) -> None:
    page.wait_for_selector('#status:has-text("ready")')
    assert page.locator("#pictures img").count() == pictures
    assert page.locator("#alert").is_hidden()


@contextlib.contextmanager
def redrawing(page: Any) -> Iterator[None]:
    """What is done within makes the page draw; at the end it has drawn."""
    with page.expect_request(lambda request: "event-stream" in request.headers.get("accept", "")):
        yield
    ready(page)


def contents(page: Any, selector: str = "#pictures img") -> NDArray[np.int64]:
    """What pictures show, at 64 px: (pictures, values)."""
    found = page.evaluate(
        """selector => Promise.all([...document.querySelectorAll(selector)].map(async (image) => {
            await image.decode();
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 64;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0, 64, 64);
            return [...context.getImageData(0, 0, 64, 64).data];
        }))""",
        selector,
    )
    return np.array(found)


def same(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pictures show the same, to float error: a picture alone and in a batch may differ by a step of its 256."""
    return np.abs(a - b).mean(-1) < 0.5
