"""Laws of the HTTP API: what is refused, with which reason, and that nothing of a person is repeated."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from serve_client import ADA, BOB, FAST, PROMPT, Client, latent_of, problem
from serve_world import base_model

from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout


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
    ("body", "hint"),
    [
        ('{"seed": 1,}', "line 1, column 1"),
        ('{"embedding": [NaN]}', "NaN is no number there"),
        ("[" * 100_000, "nested too deeply"),
        ('{"seed": 1' + "0" * 5000 + "}", "too many digits"),
        ('{"sed": 1}', "sed: there is no such field here; did you mean seed?"),
        ('{"../../etc": 1}', "there is no such field here"),
    ],
)
def test_slip_of_the_pen_is_pointed_out(api: Client, body: str, hint: str) -> None:
    answer = api("POST", "/v1/loras", content=body.encode(), headers={"content-type": "application/json"})
    assert hint in answer.json()["detail"]


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


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"seed": "abc"}, "seed: is no whole number"),
        ({"seed": 1.5}, "seed: is no whole number"),
        ({"seed": -1}, "seed: is below 0"),
        ({"seed": 2**60}, "seed: is above 9,007,199,254,740,991"),
        ({"temperature": "x"}, "temperature: is no number"),
        ({"temperature": 9}, "temperature: is above 2"),
        ({"embedding": "x"}, "embedding: is no list"),
        ({"embedding": []}, "embedding: is empty: at least 1 is needed"),
        ({"embedding": ["a"]}, "embedding.0: is no number"),
        ({"embedding": [0] * 65_537}, "embedding: has too many entries: at most 65,536 are read"),
        ({"format": "x"}, "format: is none of 'diffusers', 'peft', 'kohya', 'vector' or 'latent'"),
        ({"score": "maybe"}, "score: is neither true nor false"),
        ({"recogniser": 1}, "recogniser: is no text"),
        ({"embedding": None, "latent": 3}, "latent: is no object of names and values"),
    ],
)
def test_values_of_the_wrong_kind_are_told_in_words(api: Client, fields: dict[str, Any], detail: str) -> None:
    told = problem(api.json("/v1/loras", **{"embedding": [1.0] * 512, **fields}), 422, "invalid_request")
    assert told["detail"] == detail
