"""What the endpoint answers, as plain objects. Field by field: docs/reference/http-api.md."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class LoRA:
    """A LoRA that the server holds under its id.

    similarity: cosine of drawn faces with the photo's, if they were compared. nearest: of the photo's embedding with the
    nearest person that the synthesiser was trained on. position: on the way from one person (0) to another (1).
    deletion_token: deletes it, on a server without keys. left_out: photos of another person than most show, with their cosine.
    """

    id: str
    seed: int | None
    position: float | None
    similarity: float | None
    nearest: float | None
    expires_in: float
    deletion_token: str | None = field(default=None, repr=False)
    left_out: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Json) -> LoRA:
        nearest = data.get("nearest")
        return cls(
            data["id"],
            data.get("seed"),
            data.get("position"),
            data.get("similarity"),
            nearest["similarity"] if nearest else None,
            data["expires_in"],
            data.get("deletion_token"),
            _left_out(data),
        )


def _left_out(data: Json) -> dict[str, float]:
    return {photo["photo"]: photo["cosine"] for photo in data.get("left_out", [])}


@dataclass(frozen=True, repr=False)
class Image:
    """A picture: the file's bytes, and the seed that draws it again."""

    index: int
    seed: int
    media_type: str
    data: bytes
    similarity: float | None

    @classmethod
    def of(cls, data: Json) -> Image:
        content = base64.b64decode(data["data"])
        return cls(data["index"], data["seed"], data["media_type"], content, data.get("similarity"))

    @property
    def suffix(self) -> str:
        """Of a file name, such as ".png"."""
        return "." + self.media_type.rpartition("/")[2]

    def save(self, path: str | Path) -> Path:
        Path(path).write_bytes(self.data)
        return Path(path)

    def __repr__(self) -> str:
        return f"Image(seed={self.seed}, {self.media_type}, {len(self.data)} bytes, similarity={self.similarity})"


@dataclass(frozen=True, repr=False)
class File:
    """A LoRA file."""

    name: str
    media_type: str
    data: bytes

    def save(self, path: str | Path) -> Path:
        """Write it to `path`; into it, under its own name, if that is a folder."""
        path = Path(path)
        path = path / self.name if path.is_dir() else path
        path.write_bytes(self.data)
        return path

    def __repr__(self) -> str:
        return f"File({self.name!r}, {len(self.data)} bytes)"


@dataclass(frozen=True)
class Pictures:
    """LoRA and pictures. file: the LoRA's, if a format was asked for."""

    lora: LoRA
    images: list[Image]
    file: File | None = None

    @classmethod
    def of(cls, data: Json) -> Pictures:
        file = data.get("file")
        return cls(
            LoRA.of(data["lora"]),
            [Image.of(image) for image in data["images"]],
            File(file["name"], file["media_type"], base64.b64decode(file["data"])) if file else None,
        )


@dataclass(frozen=True)
class Progress:
    """`done` of `total` denoising steps."""

    done: int
    total: int


Event = LoRA | Progress | Image | Pictures
"""What comes while pictures are drawn: the LoRA, progress, each picture, and at the end all of it (pictures without data)."""


@dataclass(frozen=True)
class Likeness:
    """Cosines with the photos, on one scale: of faces drawn without a LoRA (base), with the nearest one in training and with the
    person's own, and of the photos among each other. None: there is no table of the training, or one photo alone. left_out: as a LoRA's."""

    base: float
    nearest: float | None
    lora: float
    photos: float | None
    left_out: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Json) -> Likeness:
        return cls(data["base"], data["nearest"], data["lora"], data["photos"], _left_out(data))


@dataclass(frozen=True)
class Latent:
    """A person in the synthesiser's own code: small, and enough to make the LoRA again with the model that made it."""

    values: list[float]
    model: str
    seed: int | None = None

    @classmethod
    def of(cls, data: Json) -> Latent:
        return cls(data["latent"]["values"], data["latent"]["model"], data["seed"])

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values, "model": self.model}


@dataclass(frozen=True)
class Face:
    """box: x1, y1, x2, y2 in px of the photo, upright. embedding: unit length. score: the detector's, 0 to 1."""

    box: list[float]
    keypoints: list[list[float]]
    score: float
    embedding: list[float]

    @classmethod
    def of(cls, data: Json) -> Face:
        return cls(data["box"], data["keypoints"], data["score"], data["embedding"])
