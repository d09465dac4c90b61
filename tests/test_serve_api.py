"""Laws of the HTTP API, with all stages in this process: what goes in, what comes out, and what is refused, and how."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from serve_world import base_model, save_synthesizer

from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.serving.config import AccessConfig, LimitsConfig, ServeConfig
from serve.api import build_api
from serve.local import local_studio
from serve.studio import Studio

FACES = Path(__file__).parent / "data" / "faces"
ADA, ADA_AGAIN, BOB = (FACES / name for name in ("80000-0.png", "80000-1.png", "80001-1.png"))
PROMPT = "a photo of sks person"
FAST = {"num_inference_steps": 3, "latent_inference_steps": 3}


@pytest.fixture(scope="session")
def synthesizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("synthesizer"))


@pytest.fixture(scope="module")
def studio(synthesizer: Path) -> Studio:
    limits = LimitsConfig(
        max_body_bytes=2_000_000, max_pixels=4_000_000, body_seconds=1.0, max_images=4, default_seconds=300.0
    )
    return local_studio(ServeConfig(synthesizer=str(synthesizer), limits=limits))


LOOP = asyncio.new_event_loop()  # one for all, as the stages work in it


class Client:
    """Calls the API."""

    def __init__(self, studio: Studio) -> None:
        self.loop = LOOP
        self.app = build_api(studio)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.client.request(method, path, **options))

    def form(
        self, path: str, photo: Path | bytes = ADA, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        data = photo if isinstance(photo, bytes) else photo.read_bytes()
        return self("POST", path, files={"photo": ("x", data)}, data=fields, headers=headers)

    def json(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return self("POST", path, json=fields, headers=headers)


@pytest.fixture(scope="module")
def api(studio: Studio) -> Iterator[Client]:
    client = Client(studio)
    yield client
    client.loop.run_until_complete(client.client.aclose())


def pixels(response_data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(response_data))).convert("RGB"))


def problem(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["reason"] == reason, document
    assert document["status"] == status
    assert document["detail"]
    return document


# -- what it is for -----------------------------------------------------------------------------------------------------


def test_photo_gives_lora_and_pictures_in_one_go(api: Client) -> None:
    response = api.form("/v1/personalize", prompt=PROMPT, num_images=2, seed=1, image_seed=5, format="kohya", **FAST)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [image["seed"] for image in answer["images"]] == [5, 6]
    assert pixels(answer["images"][0]["data"]).shape == (64, 64, 3)
    assert -1 <= answer["lora"]["similarity"] <= 1
    assert -1 <= answer["lora"]["nearest"]["similarity"] <= 1
    assert base64.b64decode(answer["file"]["data"]) == api("GET", answer["lora"]["files"]["kohya"]).content


def test_stages_one_by_one_lead_to_the_same_picture_as_in_one_go(api: Client) -> None:
    whole = api.form("/v1/personalize", prompt=PROMPT, seed=3, image_seed=4, **FAST).json()
    found = api.form("/v1/embeddings").json()["photos"][0]
    assert len(found["faces"]) == 1
    sampled = api.json(
        "/v1/latents", embedding=found["faces"][0]["embedding"], seed=3, latent_inference_steps=3
    ).json()["latents"][0]
    made = api.json("/v1/loras", latent=sampled["latent"])
    assert made.status_code == 201
    lora = made.json()["loras"][0]
    assert lora["id"] == whole["lora"]["id"]
    image = api.json("/v1/images", lora=lora["id"], prompt=PROMPT, image_seed=4, num_inference_steps=3).json()[
        "images"
    ][0]
    assert np.abs(pixels(image["data"]).astype(int) - pixels(whole["images"][0]["data"]).astype(int)).max() <= 1


def test_same_request_same_answer_and_random_seeds_are_told(api: Client) -> None:
    first, second = (api.form("/v1/loras", latent_inference_steps=3).json()["loras"][0] for _ in range(2))
    assert first["id"] != second["id"]
    again = api.form("/v1/loras", seed=first["seed"], latent_inference_steps=3).json()["loras"][0]
    assert again["id"] == first["id"]


def test_samples_of_a_person_differ_and_sample_i_has_seed_plus_i(api: Client) -> None:
    loras = api.form("/v1/loras", num_samples=3, seed=10, latent_inference_steps=3).json()["loras"]
    assert [lora["seed"] for lora in loras] == [10, 11, 12]
    vectors = [vector_of(api("GET", lora["files"]["vector"])) for lora in loras]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    # to float error, so its id, a hash of the bits, may be another: what ran in its batch is not the same
    alone = vector_of(api.form("/v1/loras", seed=11, format="vector", latent_inference_steps=3))
    np.testing.assert_allclose(alone, vectors[1], atol=1e-5)


def vector_of(file: httpx.Response) -> np.ndarray:
    return safetensors.numpy.load(file.content)["vector"]


def test_several_photos_are_one_person_between_them(api: Client) -> None:
    photos = [("photo", path.read_bytes()) for path in (ADA, ADA_AGAIN)]
    data = {"seed": "1", "latent_inference_steps": "3"}
    both = api("POST", "/v1/loras", files=photos, data=data).json()["loras"][0]["id"]
    each = {api("POST", "/v1/loras", files=[photo], data=data).json()["loras"][0]["id"] for photo in photos}
    assert both not in each
    in_json = api.json(
        "/v1/loras", photos=[base64.b64encode(data).decode() for _, data in photos], seed=1, latent_inference_steps=3
    )
    assert in_json.json()["loras"][0]["id"] == both


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "vector", "latent"])
def test_file_of_every_format_comes_back_as_the_same_lora(api: Client, tmp_path: Path, format: str) -> None:
    file = api.form("/v1/loras", seed=1, format=format, latent_inference_steps=3)
    assert file.status_code == 200
    assert "attachment" in file.headers["content-disposition"]
    lora_id = file.headers["x-lora-id"]
    assert api("GET", f"/v1/loras/{lora_id}?format={format}").content == file.content
    if format == "latent":
        (tmp_path / "x.safetensors").write_bytes(file.content)
        with safetensors.safe_open(tmp_path / "x.safetensors", "np") as opened:
            latent = {"values": opened.get_tensor("latent").tolist(), "model": opened.metadata()["model"]}
        assert api.json("/v1/loras", latent=latent).json()["loras"][0]["id"] == lora_id
    else:
        uploaded = api("POST", "/v1/loras", files={"lora_file": ("../../etc/x", file.content)})
        assert uploaded.status_code == 201, uploaded.text
        assert uploaded.json()["loras"][0]["id"] == lora_id


def test_diffusers_file_loads_as_the_vector_that_was_served(api: Client, tmp_path: Path) -> None:
    layout = LoRALayout.from_unet(base_model().unet)
    files = {name: api.form("/v1/loras", seed=1, format=name).content for name in ("diffusers", "vector")}
    vectors = []
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        vectors.append(formats.load(tmp_path / f"{name}.safetensors", layout))
    assert bool((vectors[0] == vectors[1]).all())


def test_score_compares_drawn_faces_with_the_photo(api: Client) -> None:
    lora = api.form("/v1/loras", seed=1, score="true", latent_inference_steps=3).json()["loras"][0]
    assert -1 <= lora["similarity"] <= 1
    problem(api.json("/v1/loras", latent=latent_of(api), score=True), 422, "invalid_request")


@pytest.mark.parametrize(("accept", "kind"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/jpeg", "JPEG")])
def test_picture_itself_is_answered_to_who_accepts_images(api: Client, accept: str, kind: str) -> None:
    response = api.form("/v1/images", prompt=PROMPT, headers={"Accept": accept}, **FAST)
    assert response.headers["content-type"] == accept
    assert Image.open(io.BytesIO(response.content)).format == kind
    problem(api.form("/v1/images", prompt=PROMPT, num_images=2, headers={"Accept": accept}), 406, "not_acceptable")
    problem(api.form("/v1/images", prompt=PROMPT, headers={"Accept": "video/mp4"}), 406, "not_acceptable")


def test_events_tell_lora_progress_pictures_and_the_end(api: Client) -> None:
    response = api.form(
        "/v1/personalize", prompt=PROMPT, num_images=2, image_seed=4, headers={"Accept": "text/event-stream"}, **FAST
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    names = [name for name, _ in events]
    assert names[0] == "lora"
    assert names[-1] == "done"
    assert names.count("image") == 2
    assert "progress" in names
    assert [image["seed"] for image in events[-1][1]["images"]] == [4, 5]
    assert pixels(next(data for name, data in events if name == "image")["data"]).shape == (64, 64, 3)
    # what is refused is refused with its status, not with an event
    refused = api.json("/v1/images", lora="0" * 32, prompt=PROMPT, headers={"Accept": "text/event-stream"})
    problem(refused, 404, "unknown_lora")


def latent_of(api: Client, photo: Path = ADA) -> dict[str, Any]:
    answer = api.form("/v1/latents", photo, seed=1, latent_inference_steps=3).json()
    latent: dict[str, Any] = answer["latents"][0]["latent"]
    return latent


def test_edit_changes_the_person_and_strength_zero_does_not(api: Client) -> None:
    latent = latent_of(api)
    same = api.json("/v1/loras", latent=latent).json()["loras"][0]["id"]
    assert api.json("/v1/edits", latent=latent, edits={"smile": 0}).json()["loras"][0]["id"] == same
    edited = api.json("/v1/edits", lora=same, edits={"smile": 1.5, "age": -1})
    assert edited.status_code == 201
    assert edited.json()["loras"][0]["id"] != same
    told = problem(api.json("/v1/edits", latent=latent, edits={"wings": 1}), 422, "unknown_attribute")
    assert "smile" in told["detail"]


def test_interpolation_begins_and_ends_with_the_two_people(api: Client) -> None:
    a, b = latent_of(api, ADA), latent_of(api, BOB)
    ends = [api.json("/v1/loras", latent=latent).json()["loras"][0]["id"] for latent in (a, b)]
    path = api.json("/v1/interpolations", a={"latent": a}, b={"lora": ends[1]}, num=3).json()["loras"]
    assert [lora["position"] for lora in path] == [0, 0.5, 1]
    vectors = [api("GET", lora["files"]["latent"]).content for lora in path]
    assert len(set(vectors)) == 3
    assert api("GET", f"/v1/loras/{ends[0]}").json()["id"] == ends[0]


def test_deleted_lora_is_gone_at_once(api: Client) -> None:
    lora_id = api.form("/v1/loras", seed=99, latent_inference_steps=3).json()["loras"][0]["id"]
    assert api("DELETE", f"/v1/loras/{lora_id}").status_code == 204
    problem(api("GET", f"/v1/loras/{lora_id}"), 404, "unknown_lora")
    problem(api("GET", f"/v1/loras/{lora_id}?format=kohya"), 404, "unknown_lora")
    problem(api.json("/v1/images", lora=lora_id, prompt=PROMPT), 404, "unknown_lora")
    problem(api("DELETE", f"/v1/loras/{lora_id}"), 404, "unknown_lora")


class Forgetful:
    """A library that dies, and with it what it held, the first time that somebody asks."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.lost: list[str] = []

    async def get(self, lora_id: str) -> Any:
        if not self.lost:
            self.lost.append(lora_id)
            await self._library.delete(lora_id)
        return await self._library.get(lora_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def test_lora_that_the_library_lost_meanwhile_is_made_again(
    api: Client, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = Forgetful(studio.library)
    monkeypatch.setattr(studio.renderer, "_library", forgetful)
    answer = api.form("/v1/personalize", prompt=PROMPT, **FAST)
    assert answer.status_code == 200, answer.text
    assert forgetful.lost == [answer.json()["lora"]["id"]]
    # but one that a client names, and that is gone, is gone
    forgetful.lost.clear()
    problem(api.json("/v1/images", lora=answer.json()["lora"]["id"], prompt=PROMPT), 404, "unknown_lora")


def test_model_tells_what_a_client_needs_to_know(api: Client) -> None:
    model = api("GET", "/v1/model").json()
    base = base_model()
    assert model["base"] == {"name": "tiny-sd", "fingerprint": base.fingerprint, "image_size": 64}
    assert model["layout"]["layout_id"] == LoRALayout.from_unet(base.unet).layout_id
    assert model["synthesizer"]["attributes"] == ["smile", "age"]
    assert model["limits"]["max_images"] == 4
    assert latent_of(api)["model"] == model["synthesizer"]["id"]


def test_operations_answer(api: Client) -> None:
    assert api("GET", "/healthz").json() == {"status": "ok"}
    assert api("GET", "/readyz").json() == {"status": "ready"}
    api.form("/v1/personalize", prompt=PROMPT, **FAST)
    text = api("GET", "/metrics").text
    for stage in ("embedder", "denoiser", "decoder", "renderer"):
        assert f'lora_diffusion_stage_work_seconds_count{{stage="{stage}"}}' in text
        assert f'lora_diffusion_stage_batch_size_count{{stage="{stage}"}}' in text
    assert 'lora_diffusion_requests_total{route="/v1/personalize",status="200"}' in text
    assert "lora_diffusion_library_loras " in text


# -- bad input ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, whatever its content."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def two_people() -> bytes:
    a, b = (Image.open(path).convert("RGB") for path in (ADA, BOB))
    both = Image.new("RGB", (a.width + b.width, a.height))
    both.paste(a, (0, 0))
    both.paste(b, (a.width, 0))
    return saved(both, "PNG")


BAD_PHOTOS = {
    "no face": (saved(Image.new("RGB", (64, 64), "grey"), "PNG"), 422, "no_face"),
    "text": (b"hello", 422, "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 422, "svg"),
    "html": (b"<html><script>alert(1)</script></html>", 422, "not_an_image"),
    "zip and gif at once": (b"GIF89a" + b"\0" * 20 + b"PK\x03\x04", 422, None),
    "bomb": (png(60_000, 60_000), 413, "too_large"),
    "large": (png(2_001, 2_000), 413, "too_large"),
    "claims more than it holds": (png(500, 500, zlib.compress(b"\0")), 422, "truncated"),
    "cut": (ADA.read_bytes()[:900], 422, "truncated"),
    "tiny": (saved(Image.new("RGB", (3, 3)), "PNG"), 422, "too_small"),
    "animated": (
        saved(
            Image.new("RGB", (64, 64), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")]
        ),
        422,
        "animated",
    ),
    "pickle": (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", 422, "not_an_image"),
}


@pytest.mark.parametrize("name", BAD_PHOTOS)
def test_bad_photo_is_refused_with_its_reason(api: Client, name: str) -> None:
    data, status, reason = BAD_PHOTOS[name]
    response = api.form("/v1/loras", data)
    problem(response, status, reason or response.json()["reason"])


def test_faces_of_a_group_are_told_and_the_largest_is_taken_only_if_asked(api: Client) -> None:
    photo = two_people()
    faces = api.form("/v1/embeddings", photo).json()["photos"][0]["faces"]
    assert len(faces) == 2
    sizes = [(f["box"][2] - f["box"][0]) * (f["box"][3] - f["box"][1]) for f in faces]
    assert sizes == sorted(sizes, reverse=True)
    problem(api.form("/v1/loras", photo), 422, "several_faces")
    assert api.form("/v1/loras", photo, faces="largest").status_code == 201


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"{", {"content-type": "application/json"}, 400, "malformed_body"),
        (b"[" * 100_000, {"content-type": "application/json"}, 400, "malformed_body"),
        (b'{"embedding": [NaN]}', {"content-type": "application/json"}, 400, "malformed_body"),
        (b'{"embedding": [1e999]}', {"content-type": "application/json"}, 422, "invalid_request"),
        (b'"text"', {"content-type": "application/json"}, 400, "malformed_body"),
        (b"\xff\xfe", {"content-type": "application/json"}, 400, "malformed_body"),
        (b'{"photos": ["!!"]}', {"content-type": "application/json"}, 422, "invalid_request"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", {"content-type": "application/json"}, 400, "malformed_body"),
        (b"x=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b"photo", {"content-type": "image/png"}, 415, "unsupported_media_type"),
        (b"", {}, 415, "unsupported_media_type"),
        (b"no parts", {"content-type": "multipart/form-data; boundary=x"}, 400, "malformed_body"),
        (b"--x", {"content-type": "multipart/form-data"}, 400, "malformed_body"),
        (b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}, 422, "invalid_request"),
        (b"\0" * 2_000_001, {"content-type": "application/json"}, 413, "body_too_large"),
        (b"{}", {"content-type": "application/json", "content-length": "99999999999"}, 413, "body_too_large"),
    ],
)
def test_bad_body_is_refused(api: Client, body: bytes, headers: dict[str, str], status: int, reason: str) -> None:
    problem(api("POST", "/v1/loras", content=body, headers=headers), status, reason)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, ""),
        ({"prompt": "x" * 10_000}, "prompt"),
        ({"prompt": PROMPT, "num_images": 5}, "num_images"),
        ({"prompt": PROMPT, "num_images": 0}, "num_images"),
        ({"prompt": PROMPT, "num_inference_steps": 10**9}, "num_inference_steps"),
        ({"prompt": PROMPT, "guidance_scale": 1e9}, "guidance_scale"),
        ({"prompt": PROMPT, "image_seed": -1}, "image_seed"),
        ({"prompt": PROMPT, "image_seed": 2**64}, "image_seed"),
        ({"prompt": PROMPT, "image_format": "../etc"}, "image_format"),
        ({"prompt": PROMPT, "lora": "../" * 10 + "etc/passwd"}, "lora"),
        ({"prompt": PROMPT, "steps": 3}, "steps"),
        ({"prompt": 7}, "prompt"),
    ],
)
def test_bad_value_is_refused_and_says_where(api: Client, fields: dict[str, Any], where: str) -> None:
    source = {} if "lora" in fields else {"embedding": [1.0] * 512}
    told = problem(api.json("/v1/images", **source, **fields), 422, "invalid_request")
    assert where in told["detail"]


@pytest.mark.parametrize(
    "embedding", [[], [1.0], [1.0] * 511, [0.0] * 512, ["x"] * 512, [None] * 512, "abc", {"a": 1}, [[1.0] * 512]]
)
def test_bad_embedding_is_refused(api: Client, embedding: Any) -> None:
    problem(api.json("/v1/latents", embedding=embedding), 422, "invalid_request")


def test_embedding_of_any_length_and_scale_counts_by_its_direction(api: Client) -> None:
    values = np.random.default_rng(0).standard_normal(512)
    answers = [
        api.json("/v1/latents", embedding=(values * scale).tolist(), seed=1, latent_inference_steps=3).json()
        for scale in (1, 1e-3, 1e300)
    ]
    codes = np.array([answer["latents"][0]["latent"]["values"] for answer in answers])
    np.testing.assert_allclose(codes[1:], codes[:1].repeat(2, 0), atol=1e-4)


def test_exactly_one_source_is_wanted(api: Client) -> None:
    told = problem(api.json("/v1/images", prompt=PROMPT), 422, "invalid_request")
    assert "exactly one of" in told["detail"]
    problem(api.json("/v1/images", prompt=PROMPT, lora="0" * 32, embedding=[1.0] * 512), 422, "invalid_request")


@pytest.mark.parametrize(
    "prompt", ["\u4f60\u597d sks person \U0001f600", "\0\x1b[31m", "e\u0301" * 300, "' OR 1=1 --", "\u202etxet"]
)
def test_any_text_is_a_prompt(api: Client, prompt: str) -> None:
    response = api.json("/v1/images", prompt=prompt, embedding=[1.0] * 512, **FAST)
    assert response.status_code == 200, response.text


def test_latent_of_another_synthesiser_or_length_is_refused(api: Client) -> None:
    latent = latent_of(api)
    problem(api.json("/v1/loras", latent={**latent, "model": "0" * 16}), 409, "stale_latent")
    problem(api.json("/v1/loras", latent={**latent, "values": [0.0] * 3}), 409, "stale_latent")
    problem(api.json("/v1/edits", latent={**latent, "values": [0.0] * 3}, edits={"smile": 1}), 409, "stale_latent")
    extreme = api.json("/v1/loras", latent={**latent, "values": [1.7e308] * 16})
    assert extreme.status_code < 500 or extreme.json()["reason"] == "diverged"


def lora_file_of_another_layout() -> bytes:
    layout = LoRALayout.from_unet(base_model().unet, rank=2)
    return formats.to_bytes(np.ones(layout.size, np.float32), layout, "diffusers")


def hostile_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil.safetensors", b"x")
        archive.writestr("adapter_model.safetensors", b"\0" * 50_000_000)
        archive.writestr("adapter_config.json", b"{}")
    return buffer.getvalue()


def test_uploaded_file_that_is_no_lora_of_this_model_is_refused(api: Client, tmp_path: Path) -> None:
    header = json.dumps({"vector": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
    bad = {
        "text": b"hello",
        "header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
        "shape larger than the file": len(header).to_bytes(8, "little") + header,
        "another layout": lora_file_of_another_layout(),
        "zip bomb": hostile_zip(),
        "zip without the names": saved_zip({"a": b"b"}),
        "cut zip": b"PK\x03\x04abc",
        "not a number": not_a_number(tmp_path),
    }
    for name, data in bad.items():
        response = api("POST", "/v1/loras", files={"lora_file": (name, data)})
        told = problem(response, 422, "bad_lora")
        assert "/tmp" not in told["detail"]


def saved_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def not_a_number(tmp_path: Path) -> bytes:
    layout = LoRALayout.from_unet(base_model().unet)
    good = formats.to_bytes(np.ones(layout.size, np.float32), layout, "kohya")
    (tmp_path / "good.safetensors").write_bytes(good)
    tensors = safetensors.numpy.load(good)
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    return bytes(safetensors.numpy.save(tensors))


@pytest.mark.parametrize("path", ["/v1/loras/..%2f..%2fetc%2fpasswd", "/v1/loras/x", "/v1/loras/" + "0" * 33])
def test_id_that_is_none_never_gets_further_than_its_pattern(api: Client, path: str) -> None:
    for method in ("GET", "DELETE"):
        response = api(method, path)
        assert response.status_code in (404, 422)
        assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/%2e%2e/pyproject.toml", "/static/..%2f..%2fapp.py", "/nothing"]
)
def test_nothing_but_the_page_is_served_from_the_disk(api: Client, path: str) -> None:
    problem(api("GET", path), 404, "not_found")


def test_wrong_method_is_a_problem_document(api: Client) -> None:
    assert "allow" in {name.lower() for name in api("PUT", "/v1/loras").headers}
    problem(api("PUT", "/v1/loras"), 405, "method_not_allowed")


def test_problems_do_not_repeat_what_was_sent(api: Client) -> None:
    secret = "a very private wish"
    response = api.json("/v1/images", prompt=[secret], embedding=[secret] * 512, wish=secret)
    problem(response, 422, "invalid_request")
    assert secret not in response.text


# -- time, keys, rates ----------------------------------------------------------------------------------------------------


def test_slow_body_is_given_up(api: Client) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(20)
        yield b"}"

    problem(api("POST", "/v1/loras", content=drip(), headers={"content-type": "application/json"}), 408, "slow_body")


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


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "x", "0"])
def test_senseless_deadline_is_passed_over(api: Client, value: str) -> None:
    assert api("GET", "/v1/model", headers={"X-Request-Timeout-Seconds": value}).status_code == 200


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


def variant(studio: Studio, denoiser: Any = None, **changes: Any) -> Client:
    """The same stages behind another configuration."""
    changed = Studio(
        replace(studio.config, **changes),
        studio.metrics,
        embedder=studio.embedder,
        denoiser=denoiser or studio.denoiser,
        decoder=studio.decoder,
        renderer=studio.renderer,
        library=studio.library,
    )
    return Client(changed)


class Broken:
    async def describe(self) -> None:
        raise RuntimeError("a secret wish")


def test_error_of_ours_is_noted_and_answered_without_its_words(
    studio: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lora_diffusion.serve"):
        answer = variant(studio, denoiser=Broken())("GET", "/v1/model", headers={"X-Request-Id": "trace-8"})
    problem(answer, 500, "internal_error")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "lora_diffusion.serve"]
    (error,) = [line for line in lines if line["event"] == "error"]
    assert (error["request_id"], error["error"]) == ("trace-8", "RuntimeError")
    assert any("describe" in frame for frame in error["frames"])
    assert "secret" not in answer.text + caplog.text


def test_key_is_wanted_where_keys_are_set(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIFFUSION_API_KEYS", "first, second")
    guarded = variant(studio)
    assert guarded("GET", "/healthz").status_code == 200
    told = guarded("GET", "/v1/model")
    problem(told, 401, "unauthorized")
    assert told.headers["www-authenticate"] == "Bearer"
    problem(guarded("GET", "/v1/model", headers={"Authorization": "Bearer third"}), 401, "unauthorized")
    for headers in ({"Authorization": "Bearer second"}, {"X-API-Key": "first"}):
        assert guarded("GET", f"/v1/loras/{'0' * 32}", headers=headers).json()["reason"] == "unknown_lora"


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
