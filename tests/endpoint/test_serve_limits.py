"""Laws of the HTTP API: deadlines, keys, rates, queues, other sites, logs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_client import ADA, FAST, PROMPT, Client, pixels, problem, variant

from lora_diffusion.endpoint.middleware import Deadline
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.lora import formats
from lora_diffusion.serving.config import AccessConfig, LimitsConfig
from lora_diffusion.serving.errors import deadline_exceeded
from lora_diffusion.serving.faces import Embedder
from lora_diffusion.serving.messages import DrawnImage, DrawTask, LoRARecord, Progress


def test_slow_body_is_given_up(api: Client) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(20)
        yield b"}"

    problem(api("POST", "/v1/loras", content=drip(), headers={"content-type": "application/json"}), 408, "slow_body")


def test_a_large_photo_in_a_form_touches_no_disk(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    photo = b"\xff\xd8\xff" + bytes(2**20 + 2**18)
    problem(api("POST", "/v1/loras", files={"photo": ("x.jpg", photo)}), 422, "not_an_image")


def test_deadline_of_the_caller_ends_the_work(api: Client) -> None:
    response = api.json(
        "/v1/images",
        prompt=PROMPT,
        embedding=[1.0] * 512,
        num_images=4,
        num_inference_steps=100,
        headers={"X-Request-Timeout-Seconds": "0.5"},
    )
    problem(response, 504, "deadline_exceeded")


@pytest.mark.parametrize("value", ["abc", "-1", "0", "nan", "inf", ""])
@pytest.mark.parametrize("path", ["/v1/model", "/healthz"])
def test_deadline_that_is_none_is_refused(api: Client, path: str, value: str) -> None:
    told = problem(api("GET", path, headers={"X-Request-Timeout-Seconds": value}), 422, "invalid_request")
    assert told["detail"] == "X-Request-Timeout-Seconds is not a number of seconds above 0."


class Stuck:
    """A stage that forgets the deadline."""

    async def describe(self) -> None:
        await asyncio.sleep(60)


def test_deadline_is_kept_for_a_stage_that_hangs(studio: Studio) -> None:
    answer = variant(studio, stages={"denoiser": Stuck()})(
        "GET", "/v1/model", headers={"X-Request-Timeout-Seconds": "0.2"}
    )
    problem(answer, 504, "deadline_exceeded")
    assert answer.elapsed.total_seconds() < 30


@pytest.mark.parametrize(
    ("asked", "given"), [("0.01", 0.005), ("0.2", 0.1), ("2", 1.75), ("10", 9.5), ("1e9", 300), (None, 60)]
)
def test_the_answer_comes_before_a_proxy_that_knows_the_header_gives_up(asked: str | None, given: float) -> None:
    async def nothing(*_: Any) -> None: ...

    assert Deadline(nothing, LimitsConfig())._seconds(asked) == pytest.approx(given)


class Slow:
    """A renderer that notices the deadline a little late."""

    async def draw(self, task: DrawTask, deadline: float) -> AsyncIterator[Progress]:
        yield Progress(1, 2)
        await asyncio.sleep(deadline - time.monotonic() + 0.1)
        raise deadline_exceeded("before its pictures were drawn")


def test_events_that_have_begun_tell_that_time_is_up(api: Client, studio: Studio) -> None:
    lora = api.form("/v1/loras", seed=1, latent_inference_steps=3).json()["loras"][0]["id"]
    headers = {"Accept": "text/event-stream", "X-Request-Timeout-Seconds": "0.5"}
    client = variant(studio, stages={"renderer": Slow()})
    answer = client.json("/v1/images", headers=headers, prompt=PROMPT, lora=lora)
    assert answer.status_code == 200
    assert '"reason": "deadline_exceeded"' in answer.text.rpartition("event: problem")[2]


def test_request_id_is_echoed_only_if_it_is_one(api: Client) -> None:
    assert api("GET", "/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    forged = api("GET", "/healthz", headers={"X-Request-Id": 'x" } {"event": "forged'})
    assert "forged" not in forged.headers["x-request-id"]


def test_logs_hold_request_ids_and_nothing_of_a_person(api: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lora_diffusion.serve"):
        api.form("/v1/images", prompt="a secret wish of sks person", headers={"X-Request-Id": "trace-7"}, **FAST)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "lora_diffusion.serve"]
    line = next(line for line in lines if line["request_id"] == "trace-7")
    assert (line["route"], line["status"]) == ("/v1/images", 200)
    assert "secret" not in caplog.text


class Broken:
    async def describe(self) -> None:
        raise RuntimeError("a secret wish")


def test_error_of_ours_is_noted_and_answered_without_its_words(
    studio: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lora_diffusion.serve"):
        answer = variant(studio, stages={"denoiser": Broken()})("GET", "/v1/model", headers={"X-Request-Id": "trace-8"})
    problem(answer, 500, "internal_error")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "lora_diffusion.serve"]
    (error,) = [line for line in lines if line["event"] == "error"]
    assert (error["request_id"], error["error"]) == ("trace-8", "RuntimeError")
    assert any("describe" in frame for frame in error["frames"])
    assert "secret" not in answer.text + caplog.text


def test_who_asks_too_often_is_told_when_to_come_back(studio: Studio) -> None:
    limited = variant(studio, access=AccessConfig(requests_per_minute=6, burst=2))
    statuses = [limited("GET", f"/v1/loras/{'0' * 32}").status_code for _ in range(3)]
    assert statuses == [404, 404, 429]
    told = limited("GET", "/v1/model")
    problem(told, 429, "rate_limited")
    assert 1 <= int(told.headers["retry-after"]) <= 10


def test_more_work_than_the_gateway_holds_is_refused_at_once(studio: Studio) -> None:
    small = variant(studio, limits=replace(studio.config.limits, max_in_flight=2))
    answers = small.loop.run_until_complete(ask_at_once(small, 6))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 4
    problem(refused[0], 503, "overloaded")
    assert int(refused[0].headers["retry-after"]) >= 1
    assert sum(answer.status_code == 200 for answer in answers) == 2


def test_slow_uploads_keep_nobody_out(studio: Studio) -> None:
    small = variant(studio, limits=replace(studio.config.limits, max_in_flight=2, body_seconds=60.0))

    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def scenario() -> httpx.Response:
        headers = {"content-type": "application/json"}
        slow = [asyncio.create_task(small.client.post("/v1/loras", content=drip(), headers=headers)) for _ in range(5)]
        await asyncio.sleep(0.1)
        answer = await small.client.post("/v1/latents", json={"embedding": [1.0] * 512, "latent_inference_steps": 3})
        for task in slow:
            task.cancel()
        return answer

    assert small.loop.run_until_complete(scenario()).status_code == 200


async def ask_at_once(client: Client, count: int) -> list[httpx.Response]:
    body = {"prompt": PROMPT, "embedding": [1.0] * 512, **FAST}
    return await asyncio.gather(*(client.client.post("/v1/images", json=body) for _ in range(count)))


def test_other_sites_are_let_in_only_by_name(studio: Studio, api: Client) -> None:
    headers = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in api("GET", "/healthz", headers=headers).headers
    opened = variant(studio, access=AccessConfig(cors_origins=("https://shop.example",)))
    allowed = opened("GET", "/healthz", headers=headers).headers["access-control-allow-origin"]
    assert allowed == "https://shop.example"


def test_people_drawn_together_are_drawn_as_alone(api: Client) -> None:
    """Through HTTP: four people in one running batch, each with its own prompt, seed, guidance and steps."""
    rng = np.random.default_rng(1)
    requests = [
        {
            "prompt": f"a photo of sks person, {word}",
            "embedding": rng.standard_normal(512).tolist(),
            "seed": i,
            "image_seed": 50 + i,
            "guidance_scale": 1.0 + i,
            "num_inference_steps": 3 + i,
            "latent_inference_steps": 3,
        }
        for i, word in enumerate(("smiling", "neutral", "forest background", "studio light"))
    ]

    async def at_once() -> list[httpx.Response]:
        return await asyncio.gather(*(api.client.post("/v1/images", json=body) for body in requests))

    for body, answer in zip(requests, api.loop.run_until_complete(at_once()), strict=True):
        alone = api.json("/v1/images", **body).json()["images"][0]["data"]
        together = answer.json()["images"][0]["data"]
        assert np.abs(pixels(alone).astype(int) - pixels(together).astype(int)).max() <= 1


SURROGATE = "\\ud83d"  # half of a smiley, as JSON writes it
POISONS = [
    f'"prompt": "{SURROGATE}"',
    f'"prompt": "a", "negative_prompt": "{SURROGATE}"',
    f'"prompt": "a", "negative_prompt": "{SURROGATE}{SURROGATE}"',
    '"prompt": "a", "negative_prompt": "\\ude00 b"',
    f'"prompt": "a", "{SURROGATE}": 1',
    f'"prompt": "a", "lora": "{SURROGATE}"',
    f'"prompt": "a", "image_format": "{SURROGATE}"',
    f'"prompt": "a", "faces": "{SURROGATE}"',
    f'"prompt": "a", "latent": {{"model": "{SURROGATE}", "values": [0]}}',
    f'"prompt": "a", "photos": ["{SURROGATE}"]',
    f'"prompt": ["{SURROGATE}"]',
    '"prompt": null',
    '"prompt": "a", "negative_prompt": 7',
    '"prompt": "a", "negative_prompt": ["a"]',
    '"prompt": {"a": "b"}',
    '"prompt": "a", "image_seed": 1e400',
    '"prompt": "a", "image_seed": 9007199254740993',
    '"prompt": "a", "image_seed": 0.5',
    '"prompt": "a", "guidance_scale": NaN',
    '"prompt": "a", "guidance_scale": 1e400',
    '"prompt": "a", "guidance_scale": -Infinity',
    '"prompt": "a", "num_inference_steps": 0',
    '"prompt": "a", "num_inference_steps": 1001',
    '"prompt": "a", "num_images": 0',
    '"prompt": "a", "num_images": 1e9',
    '"prompt": "a", "temperature": 1e308',
    '"prompt": "a", "deviation_scale": 1e308',
    '"prompt": "a", "latent_guidance_scale": -1',
    '"prompt": "a", "latent_inference_steps": 1000000',
    '"prompt": "a", "embedding": [1e400]',
    '"prompt": "a", "embedding": []',
    '"prompt": "a", "seed": "x"',
]


def test_nobody_is_disturbed_by_what_another_one_sends(api: Client) -> None:
    """Four people draw at one time; one of them sends all the poisons, the others get their pictures."""
    rng = np.random.default_rng(2)
    people = [{"prompt": PROMPT, "embedding": rng.standard_normal(512).tolist(), "image_seed": i} for i in range(3)]
    embedding = f'"embedding": {json.dumps([1.0] * 512)}, '

    own = ('"lora"', '"latent"', '"photos"', '"embedding"')
    bodies = [f"{{{'' if any(name in text for name in own) else embedding}{text}}}".encode() for text in POISONS]
    draw = {"num_inference_steps": 10, "latent_inference_steps": 3, "seed": 1}

    async def at_once() -> list[httpx.Response]:
        good = [api.client.post("/v1/images", json=person | draw) for person in people]
        headers = {"content-type": "application/json"}
        bad = [api.client.post("/v1/images", content=body, headers=headers) for body in bodies]
        return await asyncio.gather(*good, *bad)

    answers = api.loop.run_until_complete(at_once())
    others, poisoned = answers[:3], answers[3:]
    for text, answer in zip(POISONS, poisoned, strict=True):
        assert answer.status_code in (400, 422), (text, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    assert [answer.status_code for answer in others] == [200] * 3


def test_a_text_that_got_past_the_checks_spoils_one_picture_only(api: Client, studio: Studio) -> None:
    """What is not refused at the door, as in a stage that is called directly, still ends its own request alone."""
    vector_N = np.zeros(studio.decoder._stage.layout.size, np.float32)  # type: ignore[attr-defined]

    async def draw(prompt: str, negative_prompt: str = "") -> list[Any]:
        task = DrawTask("0" * 32, prompt, negative_prompt, (1,), 2.0, 3, record=LoRARecord(vector_N=vector_N))
        return [event async for event in studio.renderer.draw(task, time.monotonic() + 60)]

    async def at_once() -> list[Any]:
        texts = [("a",), ("b", "\ud83d"), ("c",), ("\ude00",)]
        return await asyncio.gather(*(draw(*text) for text in texts), return_exceptions=True)

    outcomes = api.loop.run_until_complete(at_once())
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, True, False, True]
    assert all(any(isinstance(event, DrawnImage) for event in outcomes[i]) for i in (0, 2))


FORM = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n%b\r\n--x--\r\n'


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"photos": [base64.b64encode(b"x" * 14_000_000).decode()]}).encode(),
        FORM % np.random.default_rng(0).bytes(19_000_000),
        FORM % (b"\r" * 19_000_000),
        b'{"photos":[' + b"{}," * 6_000_000 + b"{}]}",
        b"{" + b",".join(b'"%x":1' % i for i in range(1_300_000)) + b"}",
        b'{"photos":[' + b"{}," * 99_000 + b"{}]}",
        b"{" + b",".join(b'"%x":1' % i for i in range(90_000)) + b"}",
        b'{"photos":["AAAA"],"edits":{' + b",".join(b'"%x":1' % i for i in range(90_000)) + b"}}",
        b'{"embedding":[' + b'"x",' * 90_000 + b"1]}",
        b'{"photos":["AAAA"],"a":{"latent":{' + b",".join(b'"%x":1' % i for i in range(90_000)) + b"}}}",
        b'{"embedding":[' + (b"9" * 4000 + b",") * 4000 + b"1]}",
    ],
    ids=[
        "large photo",
        "form",
        "form of line ends",
        "many photos",
        "many names",
        "photos",
        "names",
        "edits",
        "embedding",
        "names further in",
        "digits",
    ],
)
def test_a_body_of_very_many_values_holds_up_nobody(studio: Studio, body: bytes) -> None:
    """Parsing and checking happen where all others are answered: of a second, /healthz waits for at most a fifth.

    It is the loop's own time that counts: the machine may be busy.
    """
    api = variant(studio, limits=LimitsConfig(max_body_bytes=20_000_000))
    gaps: list[float] = []

    async def heartbeat() -> None:
        while True:
            start = time.thread_time()
            await asyncio.sleep(0.002)
            gaps.append(time.thread_time() - start)

    async def ask() -> httpx.Response:
        beat = asyncio.ensure_future(heartbeat())
        await asyncio.sleep(0)  # it has begun
        headers = {"content-type": "application/json" if body[:1] == b"{" else "multipart/form-data; boundary=x"}
        answer = await api.client.post("/v1/embeddings", content=body, headers=headers)
        before = len(gaps)
        while len(gaps) == before:  # until the beat ends that was under way
            await asyncio.sleep(0.002)
        beat.cancel()
        return answer

    answer = api.loop.run_until_complete(ask())
    assert answer.status_code in (400, 413, 422), answer.text[:300]
    assert len(answer.content) < 10_000
    assert max(gaps) < 0.2


def test_a_photo_that_takes_long_holds_up_nobody(studio: Studio) -> None:
    """49 megapixels in 0.2 MB: four are decoded apart, two at a time, while another person is answered; and they end."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((7000, 7000, 4), np.uint8)).save(buffer, "PNG")
    config = replace(studio.config, limits=LimitsConfig())
    api = variant(studio, stages={"embedder": Embedder(config)}, limits=config.limits)
    order: list[str] = []

    async def ask(name: str, photo: bytes, seconds: str) -> httpx.Response:
        headers = {"X-Request-Timeout-Seconds": seconds}
        answer = await api.client.post("/v1/embeddings", files={"photo": ("x", photo)}, headers=headers)
        order.append(name)
        return answer

    async def at_once() -> list[httpx.Response]:
        heavy = [ask("heavy", buffer.getvalue(), "1") for _ in range(4)]
        return await asyncio.gather(*heavy, ask("light", ADA.read_bytes(), "60"))

    *heavy, light = api.loop.run_until_complete(at_once())
    assert order[0] == "light"
    assert light.status_code == 200
    assert {answer.json()["reason"] for answer in heavy} <= {"deadline_exceeded", "unreadable"}


def test_a_lora_of_enormous_numbers_spoils_its_own_pictures_only(api: Client, studio: Studio) -> None:
    """What no check refuses, as each number is finite, overflows in the batch: in its own row."""
    layout = studio.decoder._stage.layout  # type: ignore[attr-defined]
    file = formats.to_bytes(np.full(layout.size, 1e30, np.float32), layout, "vector")
    person = {"prompt": PROMPT, "embedding": [1.0] * 512, "seed": 1, "image_seed": 2, **FAST}
    alone = api.json("/v1/images", **person).json()["images"][0]["data"]

    async def at_once() -> list[httpx.Response]:
        poison = {"prompt": PROMPT, "num_inference_steps": "3"}
        bad = api.client.post("/v1/images", files={"lora_file": ("x", file)}, data=poison)
        return await asyncio.gather(bad, *(api.client.post("/v1/images", json=person) for _ in range(3)))

    bad, *good = api.loop.run_until_complete(at_once())
    assert bad.status_code in (200, 422)
    for answer in good:
        drawn = pixels(answer.json()["images"][0]["data"]).astype(int)
        assert np.abs(drawn - pixels(alone).astype(int)).max() <= 1


def test_of_a_very_large_photo_the_faces_are_told_in_its_own_pixels(studio: Studio) -> None:
    config = replace(studio.config, limits=LimitsConfig())
    api = variant(studio, stages={"embedder": Embedder(config)}, limits=config.limits)
    small = Image.open(ADA).convert("RGB").resize((1000, 1000))
    told = []
    for side in (1000, 5000):
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (photo,) = api.form("/v1/embeddings", buffer.getvalue()).json()["photos"]
        assert (photo["width"], photo["height"]) == (side, side)
        told.append(photo["faces"][0])
    assert np.allclose(np.array(told[0]["box"]) * 5, told[1]["box"], atol=75)
    assert np.allclose(np.array(told[0]["keypoints"]) * 5, told[1]["keypoints"], atol=75)
    assert np.dot(told[0]["embedding"], told[1]["embedding"]) > 0.9
