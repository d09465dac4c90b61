"""The calls of the HTTP API as values: what to send, and how to read the answer. Both clients carry them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx

from lora_diffusion.client import answers
from lora_diffusion.client.retry import ApiError

Photo = str | Path | bytes
"""A path, or the file's bytes."""
Format = Literal["diffusers", "peft", "kohya", "vector", "latent"]
Person = answers.LoRA | answers.Latent | str
"""A LoRA, its id, or a latent."""
DELETION_TOKEN = "X-Deletion-Token"
T = TypeVar("T")


class SamplingOptions(TypedDict, total=False):
    """How the person's code is drawn. Left out: the server's defaults, a random seed."""

    faces: Literal["one", "largest"]
    seed: int
    latent_guidance_scale: float
    latent_inference_steps: int
    temperature: float
    deviation_scale: float


class DrawOptions(TypedDict, total=False):
    """How pictures are drawn. Picture i has image_seed + i."""

    negative_prompt: str
    num_images: int
    image_seed: int
    guidance_scale: float
    num_inference_steps: int


class ImageOptions(DrawOptions, total=False):
    """And what of the LoRA, in which format."""

    image_format: Literal["png", "jpeg", "webp"]
    lora_scale: float


class LikenessOptions(SamplingOptions, DrawOptions, total=False):
    """As for a picture, without its format."""


class PersonalizeOptions(SamplingOptions, ImageOptions, total=False):
    """Both."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """forgiven: reason of a refusal that is as good as an answer."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    fields: Mapping[str, Any] | None = None
    photos: Sequence[tuple[str, bytes]] = ()
    lora_file: bytes | None = None
    accept: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    forgiven: str = ""

    def body(self) -> dict[str, Any]:
        """Arguments of httpx: a form if there are files, else JSON, else nothing."""
        files: list[tuple[str, tuple[str, bytes, str]]] = [
            ("photo", (name, photo, "application/octet-stream")) for name, photo in self.photos
        ]
        if self.lora_file is not None:
            files.append(("lora_file", ("lora_file", self.lora_file, "application/octet-stream")))
        fields = {name: value for name, value in (self.fields or {}).items() if value is not None}
        if files:
            return {"files": files, "data": {name: _text(value) for name, value in fields.items()}}
        return {} if self.fields is None else {"json": fields}

    def as_events(self) -> Call[T]:
        return replace(self, accept="text/event-stream")

    def accepts(self, response: httpx.Response) -> bool:
        return response.is_success or bool(self.forgiven and problem(response).reason == self.forgiven)


def problem(response: httpx.Response) -> ApiError:
    """The error of an answer that is none."""
    try:
        data = response.json()
    except ValueError:
        data = None
    return ApiError.of(data, response.status_code)


def embeddings(photos: Sequence[Photo]) -> Call[list[list[answers.Face]]]:
    """The faces of each photo, largest first."""

    def parse(response: httpx.Response) -> list[list[answers.Face]]:
        return [[answers.Face.of(face) for face in photo["faces"]] for photo in response.json()["photos"]]

    return Call("POST", "v1/embeddings", parse, {}, read(photos))


def latents(
    photos: Photo | Sequence[Photo], num_samples: int = 1, **options: Unpack[SamplingOptions]
) -> Call[list[answers.Latent]]:
    """Codes of the person in the photos."""

    def parse(response: httpx.Response) -> list[answers.Latent]:
        return [answers.Latent.of(sample) for sample in response.json()["latents"]]

    return Call("POST", "v1/latents", parse, {"num_samples": num_samples, **options}, read(photos))


def loras(
    source: Photo | Sequence[Photo] | answers.Latent,
    num_samples: int = 1,
    *,
    score: bool = False,
    **options: Unpack[SamplingOptions],
) -> Call[list[answers.LoRA]]:
    """LoRAs of the person in the photos, or of a latent. score: draw each once and compare the face."""
    if isinstance(source, answers.Latent):
        return Call("POST", "v1/loras", _loras, {"latent": source.to_json(), **options})
    return Call("POST", "v1/loras", _loras, {"num_samples": num_samples, "score": score, **options}, read(source))


def upload(file: Photo) -> Call[answers.LoRA]:
    """Give the server a LoRA file: diffusers', kohya's, our vector, or a zip of peft's two files."""
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    return Call("POST", "v1/loras", _lora, {}, lora_file=data)


def download(lora: answers.LoRA | str, format: Format = "kohya") -> Call[answers.File]:
    def parse(response: httpx.Response) -> answers.File:
        disposition = response.headers.get("Content-Disposition", "")
        name = disposition.partition('filename="')[2].partition('"')[0]
        return answers.File(
            Path(name).name or f"{format}.safetensors", response.headers.get("Content-Type", ""), response.content
        )

    return Call("GET", f"{_url(lora)}?format={format}", parse, accept="*/*")


def delete(lora: answers.LoRA | str) -> Call[None]:
    """Have it forgotten now; also if the server has forgotten it already. An id alone: of one that this client made."""
    token = None if isinstance(lora, str) else lora.deletion_token
    headers = {DELETION_TOKEN: token} if token else {}
    return Call("DELETE", _url(lora), lambda response: None, headers=headers, forgiven="unknown_lora")


def images(person: Person, prompt: str, **options: Unpack[ImageOptions]) -> Call[answers.Pictures]:
    """Pictures with a LoRA that the server holds, or of a latent."""
    return Call("POST", "v1/images", _pictures, {**_person(person), "prompt": prompt, **options})


def personalize(
    photos: Photo | Sequence[Photo],
    prompt: str,
    *,
    format: Format | None = None,
    **options: Unpack[PersonalizeOptions],
) -> Call[answers.Pictures]:
    """LoRA and scored pictures of the person in the photos; with `format`, the LoRA's file too."""
    return Call("POST", "v1/personalize", _pictures, {"prompt": prompt, "format": format, **options}, read(photos))


def edit(person: Person, edits: Mapping[str, float], *, deviation_scale: float | None = None) -> Call[answers.LoRA]:
    """The LoRA of the changed person: attribute (`model()` lists them) -> strength in standard deviations."""
    fields = {**_person(person), "edits": dict(edits), "deviation_scale": deviation_scale}
    return Call("POST", "v1/edits", _lora, fields)


def interpolate(a: Person, b: Person, positions: Sequence[float]) -> Call[list[answers.LoRA]]:
    """LoRAs on the way from a (0) to b (1)."""
    return Call("POST", "v1/interpolations", _loras, {"a": _person(a), "b": _person(b), "positions": list(positions)})


def likeness(
    photos: Photo | Sequence[Photo], prompt: str, **options: Unpack[LikenessOptions]
) -> Call[answers.Likeness]:
    """How like the person drawn faces are, with the landmarks to read it against."""

    def parse(response: httpx.Response) -> answers.Likeness:
        return answers.Likeness.of(response.json())

    return Call("POST", "v1/likeness", parse, {"prompt": prompt, **options}, read(photos))


def model() -> Call[dict[str, Any]]:
    """What the server serves: base, layout, attributes, limits, defaults."""
    return Call("GET", "v1/model", lambda response: response.json())


class EventReader:
    """Server-sent events, line by line. Raises ApiError for an event `problem`."""

    def __init__(self) -> None:
        self._name, self._data = "message", ""

    def line(self, line: str) -> answers.Event | None:
        """The event that this line ends, if it does."""
        name, _, value = line.partition(":")
        if line and name == "event":
            self._name = value.strip()
        elif line and name == "data":
            self._data += value.removeprefix(" ")
        if line or not self._data:
            return None
        name, data = self._name, json.loads(self._data)
        self._name, self._data = "message", ""
        if name == "problem":
            raise ApiError.of(data)
        kinds: dict[str, Callable[[Any], answers.Event]] = {
            "lora": answers.LoRA.of,
            "image": answers.Image.of,
            "progress": lambda data: answers.Progress(data["done"], data["total"]),
            "done": answers.Pictures.of,
        }
        return kinds[name](data) if name in kinds else None


def read(photos: Photo | Sequence[Photo]) -> list[tuple[str, bytes]]:
    """The files' names and bytes. Raises ValueError for none, and OSError for a path that cannot be read."""
    several = [photos] if isinstance(photos, str | Path | bytes) else list(photos)
    if not several:
        raise ValueError("no photos were given: give at least one, as a path or as bytes")
    return [
        ("photo", photo) if isinstance(photo, bytes) else (Path(photo).name, Path(photo).read_bytes())
        for photo in several
    ]


def _loras(response: httpx.Response) -> list[answers.LoRA]:
    return [answers.LoRA.of(lora) for lora in response.json()["loras"]]


def _lora(response: httpx.Response) -> answers.LoRA:
    return _loras(response)[0]


def _pictures(response: httpx.Response) -> answers.Pictures:
    return answers.Pictures.of(response.json())


def _person(person: Person) -> dict[str, Any]:
    if isinstance(person, answers.Latent):
        return {"latent": person.to_json()}
    return {"lora": person if isinstance(person, str) else person.id}


def _url(lora: answers.LoRA | str) -> str:
    return f"v1/loras/{quote(lora if isinstance(lora, str) else lora.id, safe='')}"


def _text(value: Any) -> str:
    """As a form field: plain text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
