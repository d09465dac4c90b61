"""The page in a real Chromium, before an endpoint in this process: each thing that a visitor can do."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import PEOPLE, PHOTO, contents, opened, ready, redrawing, same
from http_endpoint import in_process
from PIL import Image

from lora_diffusion.endpoint.local import local_api
from lora_diffusion.serving.config import LimitsConfig, SamplingConfig, ServeConfig

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
SOME_TIME = "new Promise((done) => setTimeout(done, 300))"
PHONE = {"device_scale_factor": 2, "is_mobile": True, "has_touch": True}
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, **PHONE},
    "small phone": {"viewport": {"width": 320, "height": 640}, **PHONE},
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    limits = LimitsConfig(max_images=4, default_seconds=240.0)
    config = ServeConfig(limits=limits, sampling=SamplingConfig(num_inference_steps=5))
    with in_process(local_api(config)) as address:
        yield address


def focus(page: Any, selector: str) -> None:
    """Reach an element with the tab key alone."""
    for _ in range(90):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"the tab key does not lead to {selector}")


def marks(page: Any) -> dict[str, float]:
    """The likeness and its landmarks, once they are there."""
    page.wait_for_selector("[data-mark=base] [role=meter]")
    rows = page.locator("#likeness li")
    return {
        rows.nth(i).get_attribute("data-mark"): float(rows.nth(i).locator("strong").inner_text())
        for i in range(rows.count())
    }


def test_everything_can_be_done_with_the_keyboard(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        focus(page, "#file")
        focus(page, "#samples button[data-name=Noah]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#studio:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "name"  # a screen reader goes on from there
        ready(page)
        focus(page, "#prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("a photo of sks person, laughing")
        before = contents(page)
        with redrawing(page):
            page.keyboard.press("Enter")
        assert not same(before, contents(page)).any()
        focus(page, "#slider-0")
        page.keyboard.press("ArrowRight")
        assert page.locator("#slider-0").get_attribute("aria-valuetext") == "+0.5 standard deviations"
        page.wait_for_selector("#which:has-text('changed')")
        ready(page)
        focus(page, "#others button[data-name=Ines]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        focus(page, "#position")
        page.keyboard.press("Home")
        assert page.locator("#position").get_attribute("aria-valuetext") == "100 % Noah, 0 % Ines"
        focus(page, "[data-blend-format=kohya]")
        with page.expect_download():
            page.keyboard.press("Enter")


def test_likeness_has_landmarks_and_stays_after_edits_and_failed_draws(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Noah]")
        ready(page)
        first = marks(page)
        assert list(first) == ["photos", "lora", "nearest", "base"]
        assert first["photos"] > 0.5
        original = contents(page)
        page.locator("#slider-1").fill("3")
        page.wait_for_selector("#which:has-text('changed')")
        ready(page)
        assert not same(original, contents(page)).any()
        changed = marks(page)
        assert changed.keys() == first.keys()
        page.route("**/v1/images", lambda route: route.abort())
        page.click("#draw")
        page.wait_for_selector("[role=alert]:has-text('cannot be reached')")
        assert marks(page) == pytest.approx(changed, abs=0.02)
        assert page.locator("#pictures img").count() == 4  # what was drawn stays
        page.unroute("**/v1/images")
        with redrawing(page):
            page.click("#alert button:has-text('Draw again')")
        with redrawing(page):
            page.click("#reset")
        assert same(original, contents(page)).all()
        assert marks(page) == pytest.approx(first, abs=0.02)


def test_without_its_strength_the_lora_draws_what_is_shown_beside_it(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Noah]")
        ready(page)
        page.wait_for_selector("#base[src]")
        without = contents(page, "#base")
        assert not same(without, contents(page, "#big")).any()
        with redrawing(page):
            page.locator("#strength").fill("0")
        assert same(without, contents(page, "#big")).all()
        page.locator("#compare").fill("50")
        assert page.locator("#big-base").evaluate("e => e.style.clipPath") == "inset(0px 50% 0px 0px)"
        with page.expect_download() as download:
            page.click("#save")
        assert Image.open(download.value.path()).size == (512, 512)
        page.click("#zoom-open")
        shown = page.locator("#zoom-picture").get_attribute("src")
        page.keyboard.press("ArrowRight")
        assert page.locator("#zoom-picture").get_attribute("src") != shown


def test_a_blend_takes_changes_and_can_be_gone_on_with(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Noah]")
        ready(page)
        page.click("#others button[data-name=Ines]")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        seen = []
        for position in range(9):
            page.locator("#position").fill(str(position))
            seen.append(page.locator("#blend-picture").get_attribute("src"))
        assert len(set(seen)) == 9
        page.locator("#position").fill("2")
        page.locator("#slider-1").fill("3")
        page.wait_for_selector(f"#blend-picture:not([src='{seen[2]}'])")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        assert "likeness to Noah" in page.locator("#blend-share").inner_text()
        with page.expect_download() as download:
            page.click("#blend-save")
        assert Image.open(download.value.path()).size == (512, 512)
        page.click("#blend-take")
        page.wait_for_selector("#name:has-text('Noah 75 %, Ines 25 %')")
        ready(page)
        assert page.locator("[data-mark=lora] strong").inner_text() != "–"


def test_a_session_survives_a_reload_and_its_links_open_anywhere(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click("#samples button[data-name=Rosa]")
        ready(page)
        first, drawn = page.url, contents(page)
        page.fill("#prompt", "smiling, astronaut, wearing a hat")
        assert "has not learnt: astronaut, hat" in page.locator("#prompt-hint").inner_text()
        with page.expect_response("**/v1/likeness") as landmarks, redrawing(page):
            page.click("#draw")
        landmarks.value.finished()
        page.evaluate(SOME_TIME)  # for the page to show them
        assert page.locator("#prompt").input_value() == "a photo of sks person, smiling, astronaut, wearing a hat"
        assert page.url != first
        likeness = marks(page)
        page.reload()
        ready(page)
        assert page.locator("#prompt").input_value() == "a photo of sks person, smiling, astronaut, wearing a hat"
        assert page.locator("#photo").evaluate("e => e.naturalWidth") > 0
        assert marks(page) == pytest.approx(likeness, abs=0.02)
        assert page.locator("#drawn a").count() == 2
        with redrawing(page):
            page.locator("#drawn a").last.click()
        assert "beach" in page.locator("#prompt").input_value()
        assert page.url == first
        assert same(drawn, contents(page)).all()
        with opened(browser, address) as stranger:
            stranger.goto(first)
            ready(stranger)
            assert same(drawn, contents(stranger)).all()
            assert stranger.locator("#photo").is_hidden()  # a link holds no photo
        page.click("summary:has-text('What is kept')")
        with page.expect_request(lambda request: request.method == "DELETE") as request:
            page.click("#forget")
        page.wait_for_selector("#start:not([hidden])")
        assert page.request.get(request.value.url).status == 404
        assert page.evaluate("sessionStorage.getItem('session')") is None


def kept(page: Any, address: str) -> float:
    """LoRAs in the server's library."""
    text = page.request.get(f"{address}/metrics").text()
    return float(re.search(r"^lora_diffusion_library_loras (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def test_forgetting_a_person_deletes_every_lora_that_shows_them(browser: Any, address: str) -> None:
    """Changes, blends, the people that were made of blends, and what was asked for and not waited for."""
    with opened(browser, address) as page:
        before = kept(page, address)
        page.click("#samples button[data-name=Noah]")
        ready(page)
        for strength in ("1", "2", "3"):
            page.locator("#slider-1").fill(strength)
        page.wait_for_selector("#which:has-text('changed')")
        ready(page)
        noah = page.url
        page.click("#others button[data-name=Ines]")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        page.click("#blend-take")
        page.wait_for_selector("#name:has-text('Noah 50 %, Ines 50 %')")
        ready(page)
        page.locator("#slider-1").fill("-2")
        page.wait_for_selector("#which:has-text('changed')")
        ready(page)
        page.reload()
        ready(page)
        page.goto(noah)
        page.wait_for_selector("#name:text-is('Noah')")
        ready(page)
        assert kept(page, address) >= before + 12  # Noah, two changes, Ines, seven between them, a change of one
        page.click("summary:has-text('What is kept')")
        page.click("#forget")
        page.wait_for_selector("#start:not([hidden])")
        assert kept(page, address) == before
        assert page.evaluate("sessionStorage.getItem('session')") is None


def test_a_photo_of_another_person_is_left_out_and_said_to_be(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.set_input_files("#file", [PHOTO, PEOPLE / "80512-2.jpg", PEOPLE / "80511.jpg"])
        page.click("#several button:has-text('One person')")
        ready(page)
        assert page.locator("#photo-caption").inner_text() == "One of 2 photos; 1 of another person left out"
        page.click("#again")
        page.set_input_files("#file", [PHOTO, PEOPLE / "80511.jpg"])
        page.click("#several button:has-text('One person')")
        page.wait_for_selector("[role=alert]:has-text('different people')")


def test_several_photos_are_one_person_or_a_person_each(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.set_input_files("#file", [PHOTO, PEOPLE / "80512-2.jpg"])
        page.click("#several button:has-text('One person')")
        ready(page)
        assert marks(page)["photos"] > 0.5
        page.click("#again")
        page.set_input_files("#file", [PHOTO, PEOPLE / "80511.jpg"])
        page.click("#several button:has-text('A person each')")
        page.wait_for_selector("#people-status:has-text('2 of 2 done')")
        assert page.locator("#people-list .drawn-picture[src]").count() == 2
        with page.expect_download() as download:
            page.click("#people-download")
        assert download.value.suggested_filename == "80512-kohya.safetensors"
        page.click("#people-list button[aria-label='Open 80511']")
        ready(page)
        page.click("#again")
        assert page.locator("#people-list li").count() == 2


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A photo of two people."""
    people = [np.asarray(Image.open(PEOPLE / name)) for name in ("80512.jpg", "80511.jpg")]
    Image.fromarray(np.concatenate(people, axis=1)).save(tmp_path / "pair.png")
    return tmp_path / "pair.png"


def test_of_several_faces_one_is_chosen_by_its_picture(browser: Any, address: str, pair: Path) -> None:
    with opened(browser, address) as page:
        page.set_input_files("#file", pair)
        page.wait_for_selector("#faces[open]")
        assert page.locator("#found img").count() == 2
        page.locator("#found button").first.click()
        ready(page)
        page.click("#again")
        page.set_input_files("#file", [pair] * 3)
        page.click("#several button:has-text('A person each')")
        for _ in range(3):  # at once, and one dialog after the other
            page.wait_for_selector("#faces[open]")
            page.evaluate(SOME_TIME)
            page.locator("#found button").first.click()
        page.wait_for_selector("#people-status:has-text('3 of 3 done')")
        assert page.locator("#people-list .drawn-picture[src]").count() == 3


def test_what_was_waited_for_does_nothing_to_who_is_shown_now(
    browser: Any, address: str, pair: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(nobody := tmp_path / "nobody.png")
    with opened(browser, address) as page:

        def hold(selector: str, photo: Path | None = None, path: str = "**/v1/embeddings") -> Callable[[], None]:
            """Choose a photo or click; the answer to that comes when what is returned is called."""
            held: list[Any] = []
            page.route(path, lambda route: route.fallback() if held else held.append(route))
            page.set_input_files(selector, photo) if photo else page.click(selector)
            while not held:
                page.wait_for_timeout(20)

            def release() -> None:
                with page.expect_response(path):
                    held[0].continue_()
                page.evaluate(SOME_TIME)
                assert page.locator("#alert, #faces[open]").filter(visible=True).count() == 0

            return release

        for photo in (PHOTO, pair, nobody):
            slow = hold("#file", photo)
            page.click("#draw")
            page.click("#again")
            slow()
            assert page.locator("#start").is_visible()
            slow = hold("#file", photo)
            page.click("#again")
            noah = hold("#samples [data-name=Noah]")
            slow()
            page.click("#others [data-name=Ines]")
            noah()
            page.wait_for_selector("#blend-status:has-text('Move the slider')")
            slow = hold("#other-file", photo)
            rosa = hold("#others [data-name=Rosa]")
            slow()
            rosa()
            page.wait_for_selector("#blend-status:has-text('Move the slider')")
            assert page.locator("#blend-a, #blend-b").all_inner_texts() == ["Noah", "Rosa"]
            slow = hold("#other-file", photo)
            page.click("#again")
            slow()
        slow = hold("#samples [data-name=Mila]", path="**/80515.jpg")
        page.click("#samples [data-name=Noah]")
        slow()
        ready(page)
        page.click("summary:has-text('What is kept')")
        slow = hold("#forget", path="**/v1/loras/*")
        page.set_input_files("#file", PHOTO)
        ready(page)
        shown = page.url
        slow()
        assert page.locator("#name").inner_text() == "Your person"
        assert page.url == shown


def test_who_is_not_known_here_is_told_so_and_another_photo_can_be_taken(browser: Any, address: str) -> None:
    """The camera of the test shows a pattern, and no face."""
    with opened(browser, address) as page:
        assert "rendered people only, at 64 px" in page.locator("#knows").inner_text()
        page.click("#camera-open")
        page.click("#shoot")  # there as soon as the camera is
        page.wait_for_selector("[role=alert]:has-text('no face')")
        assert "knows rendered people only" in page.locator("#alert-text").inner_text()
        page.click("#alert button")
        assert page.locator("#start").is_visible()
        assert page.locator("#alert").is_hidden()
        page.set_input_files("#file", PHOTO)
        ready(page)


def test_code_to_copy_draws_what_the_page_shows(
    browser: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(browser, address) as page:
        page.set_input_files("#file", PHOTO)
        ready(page)
        page.click("summary:has-text('More settings')")
        page.fill("#negative", "<blurry; it's dark")
        page.fill("#prompt", "@smiling; a photo of sks person; forest background")
        with redrawing(page):
            page.locator("#strength").fill("0.5")
        page.click("#code summary")
        code = {}
        for language in ("curl", "Python", "diffusers"):
            page.click(f"#languages button:has-text('{language}')")
            code[language] = page.locator("#code-text").inner_text()
    monkeypatch.chdir(tmp_path)
    Path("your-person.jpg").write_bytes(PHOTO.read_bytes())
    asked = subprocess.run(["bash", "-ec", code["curl"]], capture_output=True, check=True, text=True)
    exec(compile(code["Python"], "python", "exec"), {})
    by_client = {seed: np.asarray(Image.open(f"{seed}.png")).astype(int) for seed in range(1, 5)}
    exec(compile(code["diffusers"], "diffusers", "exec"), {})
    by_curl = json.loads(asked.stdout)["images"]
    for (seed, expected), image in zip(by_client.items(), by_curl, strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["data"])))).astype(int)
        assert np.abs(drawn - expected).mean() < 1, seed
        assert np.abs(np.asarray(Image.open(f"{seed}.png")).astype(int) - expected).mean() < 1, seed


def test_without_javascript_the_notice_comes_first(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    notice = page.locator("noscript p")
    assert "needs JavaScript" in notice.inner_text()
    assert notice.bounding_box()["y"] < page.locator("#title").bounding_box()["y"]
    assert page.locator("#drop").is_hidden()  # nothing that would not answer
    context.close()


@pytest.mark.parametrize("screen", SCREENS)
def test_pictures_stay_in_sight_nothing_jumps_and_everything_has_a_name(
    browser: Any, address: str, screen: str
) -> None:
    with opened(browser, address, **SCREENS[screen]) as page:
        _check_layout(page)
        page.click("#samples button[data-name=Mila]")
        ready(page)
        marks(page)
        place = page.locator("#form").bounding_box()
        page.evaluate(
            """() => { const form = document.querySelector('#form'); window.places = new Set();
            const look = () => (window.places.add(form.getBoundingClientRect().top + scrollY), requestAnimationFrame(look)); look(); }"""
        )
        with redrawing(page):
            page.evaluate("document.querySelector('#dice').click()")
        assert page.evaluate("[...window.places]") == [pytest.approx(place["y"] + page.evaluate("scrollY"), abs=1)]
        page.locator("#slider-1").scroll_into_view_if_needed()
        if screen == "desktop":
            for height in (800, 620):
                page.set_viewport_size({"width": 1280, "height": height})
                right = [page.locator(id).bounding_box() for id in ("#viewer", ".told", "#pictures")]
                assert len({round(box["x"] + box["width"]) for box in right[:2]}) == 1
                assert right[2]["width"] <= right[0]["width"]
            page.set_viewport_size({"width": 1280, "height": 800})
        picture = page.locator("#big" if screen == "desktop" else "#strip img").first
        picture.wait_for()
        box, height = picture.bounding_box(), page.viewport_size["height"]
        assert box["height"] > 40
        assert 0 <= box["y"] <= height - box["height"]
        page.click("#others button[data-name=Ines]")
        page.wait_for_selector("#blend-status:has-text('Move the slider')")
        page.click("summary:has-text('More settings')")
        page.click("#code summary")
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
