"""Requests as bytes for the ASGI application in this process, behind all its layers: whatever comes, the answer is a documented one.

Denoiser, decoder and library work; embedder and renderer are full, as they are under load: a million cases draw nothing.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncGenerator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.local import local_stages
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.problems import MEDIA_TYPE, PHOTO_REASONS, PROBLEMS
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import LibraryConfig, LimitsConfig, SamplingConfig, ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.stages import EmbedderStage, RendererStage

EMBEDDING, LATENT = [1.0] + [0.0] * 511, {"values": [0.5] * 16, "model": "0" * 16}
LORA = "0123456789abcdef" * 2
LIMITS = LimitsConfig(max_body_bytes=1_000_000, default_seconds=20.0, body_seconds=1.0, max_samples=2)


class Full(EmbedderStage, RendererStage):
    async def ready(self) -> bool:
        return True

    async def detect(self, *_: Any) -> Any:
        raise ServingError("overloaded", "64 requests wait already. Try again a little later.")

    similarity = detect

    async def describe(self) -> dict[str, Any]:
        return {"name": "tiny-sd", "fingerprint": "0" * 16, "image_size": 64}

    async def draw(self, *_: Any) -> AsyncGenerator[Any, None]:
        await self.detect()
        yield


class Answers:
    """`ask(bytes of a request)`. errors: what the endpoint noted as faults of its own."""

    def __init__(self, synthesizer: Path) -> None:
        fast = SamplingConfig(latent_inference_steps=2)
        config = ServeConfig(
            synthesizer=str(synthesizer), limits=LIMITS, sampling=fast, library=LibraryConfig(max_bytes=5_000_000)
        )
        full, stages = Full(), local_stages(config)
        self.app = build_api(Studio(config, Metrics(), **{**stages, "embedder": full}, renderer=full))
        self.loop, self.errors = asyncio.new_event_loop(), list[str]()
        log = logging.getLogger("lora_diffusion.serve")
        log.setLevel(logging.ERROR)
        log.propagate, log.handlers = False, [logging.Handler()]
        log.handlers[0].emit = lambda record: self.errors.append(record.getMessage())  # type: ignore[method-assign]

    def ask(self, data: bytes) -> int:
        """The status. Raises AssertionError for an answer that is none of ours."""
        scope, body = request_of(data)
        sent: list[dict[str, Any]] = []
        chunks = [body[: len(body) // 2], body[len(body) // 2 :]]

        async def receive() -> dict[str, Any]:
            if not chunks:
                await asyncio.Event().wait()  # the client waits for its answer
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            sent.append(message)

        self.errors.clear()
        self.loop.run_until_complete(self.app(scope, receive, send))
        assert not self.errors, self.errors[0]
        return check(sent)


def check(sent: list[dict[str, Any]]) -> int:
    begun, content = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
    status, headers = begun["status"], {name.decode(): value.decode("latin-1") for name, value in begun["headers"]}
    assert not sent[-1].get("more_body"), "the answer has no end"
    if status < 400:
        assert status in (200, 201, 204, 307), status
    elif content:  # not of HEAD
        problem = json.loads(content)
        assert headers["content-type"] == MEDIA_TYPE
        assert problem["status"] == status
        assert problem["reason"] in PROBLEMS or problem["reason"] in PHOTO_REASONS
        assert problem["reason"] != "internal_error"
    return int(status)


def request_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """ASGI's view of a request, read as a server that forgives everything would."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, _, rest = first.partition(b" ")
    path, _, query = rest.partition(b" ")[0].partition(b"?")
    headers = [
        (name.strip().lower(), value.strip())
        for name, colon, value in (line.partition(b":") for line in lines)
        if colon
    ]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "", "state": {},
        "method": method.decode("latin-1").upper(), "path": unquote_to_bytes(path).decode("utf-8", "replace"), "raw_path": path,
        "query_string": query, "headers": headers, "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
    }, body  # fmt: skip


def _request(first: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [first, "Host: 127.0.0.1", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _post(path: str, **values: Any) -> bytes:
    return _request(f"POST {path} HTTP/1.1", json.dumps(values).encode(), Content_Type="application/json")


def requests(photo: bytes, lora: bytes) -> list[bytes]:
    """Good ones of every route, and of every way to say it."""
    draw = {
        "prompt": "a photo of sks person",
        "num_images": 2,
        "image_seed": 1,
        "negative_prompt": "é",
        "guidance_scale": 1.5,
    }
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in (
            (b"photo", b'; filename="a.png"', photo), (b"seed", b"", b"1"), (b"format", b"", b"peft"), (b"lora_file", b'; filename="x"', lora),
            (b"latent", b"", json.dumps(LATENT).encode()),
        )
    )  # fmt: skip
    form, zipped = parts + b"--b--\r\n", gzip.compress(json.dumps({"embedding": EMBEDDING[:40], "seed": 3}).encode())
    multipart = {"Content_Type": "multipart/form-data; boundary=b", "X_Request_Timeout_Seconds": "5"}
    return [
        _post("/v1/embeddings", photos=["aGVsbG8="]),
        _post("/v1/latents", embedding=EMBEDDING[:20], seed=1, num_samples=2, temperature=0.5, recogniser="x"),
        _post("/v1/latents", embedding=EMBEDDING, seed=1),
        _post("/v1/loras", latent=LATENT, format="kohya", deviation_scale=1.2, score=True),
        _post("/v1/loras", photos=["data:image/png;base64,aGVsbG8="], faces="largest"),
        _post("/v1/images", lora=LORA, reference=EMBEDDING[:9], image_format="webp", lora_scale=0.5, **draw),
        _post("/v1/personalize", photos=["aGVsbG8="], format="vector", **draw),
        _post("/v1/likeness", embedding=EMBEDDING[:9], prompt="x"),
        _post("/v1/edits", latent=LATENT, edits={"smile": 1.0, "age": -2}),
        _post("/v1/edits", lora=LORA, edits={"smile": 1.0}),
        _post("/v1/interpolations", a={"latent": LATENT}, b={"lora": LORA}, positions=[0, 0.5], num=3),
        _request("POST /v1/loras HTTP/1.1", form, Origin="http://127.0.0.1", **multipart),
        _request("POST /v1/personalize HTTP/1.1", form, Accept="image/png, text/event-stream;q=0.5", **multipart),
        _request("POST /v1/latents HTTP/1.1", zipped, Content_Type="application/json; charset=utf-8", Content_Encoding="gzip"),
        _request(f"GET /v1/loras/{LORA}?format=diffusers HTTP/1.1", X_Request_Id="a-b.c", Range="bytes=0-5"),
        _request(f"DELETE /v1/loras/{LORA} HTTP/1.1", X_Deletion_Token="ab" * 16, X_Forwarded_For="1.2.3.4, [::1]:5"),
        _request("GET /v1/model HTTP/1.1", Authorization="Bearer key", X_API_Key="key", Accept_Encoding="gzip"),
        *(_request(f"{method} {path} HTTP/1.1") for method, path in
          (("GET", "/"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/docs"), ("OPTIONS", "/v1/loras"), ("PUT", "/openapi.json"))),
    ]  # fmt: skip


@cache
def answers(folder: Path) -> Answers:
    from serve_world import save_synthesizer

    return Answers(save_synthesizer(folder / "synthesizer"))
