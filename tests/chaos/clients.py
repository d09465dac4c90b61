"""A client that asks for all that the endpoint does, knows the answer, and counts what came instead."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import random
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import safetensors.numpy
from PIL import Image

from lora_diffusion.client.retry import NO_ROUTES

FACES = sorted((Path(__file__).parents[1] / "data" / "faces").glob("*.png"))[::3]
PROMPT = "a photo of sks person"
SEEDS = 10  # for each face: the library holds few LoRAs, so that its growth is none of the memory's
# By how much what was made beside others may differ, as matrix products round otherwise: levels of a picture; the most that a weight
# may differ, as a share of the largest one (the files are float16).
BATCHED, ROUNDED = 3, 1e-3
JUNK: list[tuple[str, dict[str, Any], set[int]]] = [
    ("/v1/loras", {"files": {"photo": ("p", b"no photo")}}, {422}),
    ("/v1/loras", {"content": b"{" * 10_000, "headers": {"content-type": "application/json"}}, {400}),
    ("/v1/images", {"json": {"prompt": "a", "lora": "0" * 32, "sed": 1}}, {422}),
    ("/v1/images", {"json": {"prompt": "a", "lora": "0" * 32}}, {404}),
    ("/v1/edits", {"json": {"latent": {"values": [0.0] * 16, "model": "0" * 16}, "edits": {"smile": 1}}}, {409}),
    ("/v1/nothing", {"json": {}}, {404}),
    ("/v1/loras", {"content": b"x" * 21_000_000, "headers": {"content-type": "application/json"}}, {413}),
    ("/v1/loras", {"files": {"lora_file": ("l", b"\xff" * 1000)}}, {422}),
]


class Client:
    """allowed: reasons of problems that may come instead of an answer, while something is being killed. like: another client, which
    got the answers that this one should get."""

    def __init__(
        self, address: str, seed: int, patience: float = 60, allowed: Collection[str] = (), like: Client | None = None
    ) -> None:
        self.random, self.http = random.Random(seed), httpx.Client(base_url=address, timeout=patience)
        self.allowed = allowed
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0
        self._known: dict[Any, bytes] = like._known if like else {}  # what was asked -> the file
        self._ids: dict[str, str] = like._ids if like else {}  # hash of an uploaded file -> its id
        self._pictures: dict[Any, Any] = like._pictures if like else {}
        self._held: list[dict[str, Any]] = []

    def ask(self) -> None:
        """One request, or what belongs together, at random."""
        kinds = [self.file, self.file, self.make, self.make, self.draw, self.draw, self.fetch]
        kinds += [self.delete, self.upload, self.junk, self.leave]
        begin = time.monotonic()
        self.random.choice(kinds)()
        self.longest = max(self.longest, time.monotonic() - begin)

    def is_answered(self) -> str:
        """Empty if a photo becomes a LoRA, which is drawn, fetched and deleted; else what came instead."""
        before = len(self.wrong)
        self.make()
        self.draw()
        self.fetch()
        self.delete()
        found = self.wrong[before:]
        problems = [wrong for wrong in found if not wrong.startswith("another")]
        self.wrong = [wrong for wrong in self.wrong if wrong not in problems]
        return "; ".join(problems)

    def file(self) -> bytes:
        """Photo -> the file of its LoRA."""
        face, seed = self._person()
        answer = self._post("file", "/v1/loras", {200}, **_form(face, seed=seed, format="diffusers"))
        return self._same((face.name, seed, "diffusers"), answer.content) if answer else b""

    def make(self) -> None:
        """Photo -> a LoRA in the library, which this client holds from now on."""
        face, seed = self._person()
        if answer := self._post("make", "/v1/loras", {201}, **_form(face, seed=seed)):
            lora = answer.json()["loras"][0]
            self._held.append({**lora, "made_of": (face.name, seed)})
            if len(self._held) > 20:
                self._delete(self._held.pop(0))

    def fetch(self) -> None:
        """The file of a LoRA that is held."""
        if self._held:
            lora = self.random.choice(self._held)
            if answer := self._held_one("fetch", lora, "GET", lora["files"]["diffusers"]):
                self._same((*lora["made_of"], "diffusers"), answer.content)

    def draw(self) -> None:
        """A picture of a LoRA that is held."""
        if self._held:
            lora = self.random.choice(self._held)
            json = {"lora": lora["id"], "prompt": PROMPT, "num_inference_steps": 3, "image_seed": 1}
            if answer := self._held_one("draw", lora, "POST", "/v1/images", json=json):
                with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["data"]))) as image:
                    pixels = np.asarray(image, np.int16)
                first = self._pictures.setdefault(lora["made_of"], pixels)
                if np.abs(pixels - first).max() > BATCHED:
                    self.wrong.append(f"another picture than before of {lora['made_of']}")

    def delete(self) -> None:
        if self._held:
            self._delete(self._held.pop(self.random.randrange(len(self._held))))

    def upload(self) -> None:
        """A LoRA's file comes back, under the id that it had."""
        if data := self.file():
            files = {"lora_file": ("l.safetensors", data)}
            if answer := self._post("upload", "/v1/loras", {201}, files=files):
                lora = answer.json()["loras"][0]
                first = self._ids.setdefault(hashlib.sha256(data).hexdigest(), lora["id"])
                if first != lora["id"]:
                    self.wrong.append(f"another id than before for one file: {first}, {lora['id']}")
                self._delete(lora)

    def junk(self) -> None:
        path, request, statuses = self.random.choice(JUNK)
        self._post("junk", path, statuses, **request)

    def leave(self) -> None:
        """Go while pictures are drawn, or in the middle of a body."""
        face, seed = self._person()
        form = _form(face, seed=seed, prompt=PROMPT, num_images=4, num_inference_steps=100)
        seconds = self.random.uniform(0.01, 1.0)
        with contextlib.suppress(httpx.TransportError):
            self.http.post("/v1/images", timeout=httpx.Timeout(60, read=seconds), **form)
        self.answers["leave: left"] += 1

    def _person(self) -> tuple[Path, int]:
        return self.random.choice(FACES), self.random.randrange(SEEDS)

    def _post(self, what: str, path: str, statuses: set[int], **request: Any) -> httpx.Response | None:
        return self._ask(what, statuses, "POST", path, **request)

    def _held_one(self, what: str, lora: dict[str, Any], method: str, path: str, **request: Any) -> Any:
        """None if the LoRA is not there any more, which its holder is told: it is made again."""
        answer = self._ask(what, {200, 204, 404}, method, path, **request)
        if answer is None or answer.status_code != 404:
            return answer
        if answer.json()["reason"] != "unknown_lora" or "unknown_lora" not in self.allowed:
            self.wrong.append(f"{what}: {answer.text[:300]}")
        self.answers["ids that were lost"] += 1
        if lora in self._held:
            self._held.remove(lora)
        return None

    def _delete(self, lora: dict[str, Any]) -> None:
        self._held_one("delete", lora, "DELETE", lora["url"], headers={"X-Deletion-Token": lora["deletion_token"]})

    def _ask(self, what: str, statuses: set[int], method: str, path: str, **request: Any) -> httpx.Response | None:
        """None instead of an allowed problem, or of a wrong answer, which is counted as such."""
        try:
            answer = self.http.request(method, path, **request)
        except httpx.TransportError as error:
            self._problem(what, "transport", repr(error))
            return None
        if NO_ROUTES in answer.content:
            self._problem(what, "no routes yet", answer.text)
            return None
        if answer.status_code in statuses:
            self.answers[f"{what}: {answer.status_code}"] += 1
            return answer
        try:
            reason = str(answer.json()["reason"])
        except (ValueError, KeyError, TypeError):  # of a proxy, which knows no problem documents
            reason = f"{answer.status_code} of the proxy"
        self._problem(what, reason, f"{answer.status_code} {answer.text[:300]}")
        return None

    def _problem(self, what: str, reason: str, text: str) -> None:
        self.answers[f"{what}: {reason}"] += 1
        if reason not in self.allowed:
            self.wrong.append(f"{what}: {text}")

    def _same(self, key: Any, data: bytes) -> bytes:
        first = self._known.setdefault(key, data)
        if first != data:
            self.answers["files that are rounded otherwise"] += 1
            if not _alike(first, data):
                self.wrong.append(f"another answer than before for {key}")
        return data


def _alike(first: bytes, second: bytes) -> bool:
    a, b = (safetensors.numpy.load(data) for data in (first, second))
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return False
    values = {name: (a[name].astype(np.float32), b[name].astype(np.float32)) for name in a}
    largest = max(float(np.abs(x).max()) for x, _ in values.values())
    return all(float(np.abs(x - y).max()) <= ROUNDED * largest for x, y in values.values())


def _form(face: Path, **fields: Any) -> dict[str, Any]:
    data = {name: str(value) for name, value in fields.items()}
    data["latent_inference_steps"] = "3"
    return {"files": {"photo": ("p.png", face.read_bytes())}, "data": data}
