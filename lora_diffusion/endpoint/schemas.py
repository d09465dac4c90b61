"""What goes over the wire: requests and answers of the HTTP API. docs/reference/http-api.md tells the same in words.

A request is JSON, or multipart/form-data with the same names: there photos are the file parts called `photo` (as many as
you like), a LoRA file is the part `lora_file`, and values that are not plain (embedding, reference, latent, edits, a, b, positions)
are written as JSON. Unknown keys are errors. Limits of a server (images, steps, prompt length) are in GET /v1/model.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

MAX_SEED = 2**53 - 1  # what JavaScript holds exactly
LORA_ID = r"^[0-9a-f]{32}$"

FileFormat = Literal["diffusers", "peft", "kohya", "vector", "latent"]
ImageFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Upload:
    """A file that came. name: as the sender named it, or "" in JSON."""

    data: bytes
    name: str = ""

    @property
    def shown(self) -> str:
        """The name within a sentence: without folders and what no terminal shows, or "" if it says nothing."""
        name = "".join(c for c in PurePosixPath(self.name.replace("\\", "/")).name if c.isprintable())
        return name[:80] if "." in name.strip(".") else ""


def from_base64(value: Any) -> Any:
    """Text of a JSON body is base64: plain or URL-safe, wrapped or not, padded or not, or a data URL. Uploads pass."""
    if not isinstance(value, str):
        return value
    head, comma, rest = value.partition(",")
    text = rest if comma and head.lstrip().startswith("data:") and head.rstrip().endswith(";base64") else value
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return Upload(base64.b64decode(text + "=" * (-len(text) % 4), validate=True))
    except ValueError:
        raise ValueError("is not valid base64") from None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank: say what to draw, for example `a photo of sks person`")
    return text


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair: send valid Unicode") from None
    return text


File = Annotated[
    Upload,
    BeforeValidator(from_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 4}),
]
Files = Annotated[
    list[File], Field(fail_fast=True, min_length=1, max_length=256)
]  # how many of them is the server's limit
Text = Annotated[str, AfterValidator(_unicode)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Floats = Annotated[list[Number], Field(fail_fast=True, min_length=1, max_length=65_536)]
LoRAId = Annotated[Text, Field(pattern=LORA_ID, description="id of a LoRA that this server made or was given")]


class Request(BaseModel):
    """one_of: names of fields of which exactly one is wanted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    one_of: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in self.one_of if getattr(self, name) is not None]
        if self.one_of and len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.one_of)}; got {', '.join(given) or 'none of them'}")
        return self


class Latent(Request):
    """A person in the synthesiser's own code: small, and enough to make the LoRA again. Only for the model that made it."""

    values: Floats
    model: str = Field(pattern=r"^[0-9a-f]{16}$", description="synthesizer id, as in GET /v1/model")


class LatentOrLoRA(Request):
    """Exactly one of the two; a LoRA that was uploaded has no latent."""

    one_of = ("latent", "lora")
    latent: Latent | None = None
    lora: LoRAId | None = None


class Sampling(Request):
    """Photos of one person (their embeddings are averaged; photos of another person are left out), and how the synthesiser draws the person's code.

    Left out: the server's defaults, else what its synthesiser recommends.
    """

    photos: Files | None = Field(None, description="photos of one person, base64")
    faces: Literal["one", "largest"] = Field(
        "one", description="a photo with several faces is an error (one), or its largest face is taken"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="left out: a random one, told in the answer")
    latent_guidance_scale: Number | None = Field(None, ge=0, le=20)
    latent_inference_steps: int | None = Field(None, ge=1, le=1000)
    temperature: Number | None = Field(None, ge=0, le=2, description="how much samples of one person differ")
    deviation_scale: Number | None = Field(None, ge=0, le=4, description="how far from the mean LoRA; 1 is as learned")


class FaceSource(Sampling):
    embedding: Floats | None = Field(None, description="of the server's recogniser; need not be of unit length")
    recogniser: Text | None = Field(
        None,
        description="fingerprint of what made `embedding`, as in identity of GET /v1/model; another one than the server's is "
        "refused. Left out: believed",
    )


class AnySource(FaceSource):
    latent: Latent | None = None
    lora_file: File | None = Field(
        None,
        description="safetensors in diffusers', kohya's or our vector format, or a zip of peft's two files; base64",
    )


class DrawOptions(Request):
    prompt: Annotated[Text, AfterValidator(_not_blank)] = Field(
        description="call the person `sks person`", json_schema_extra={"minLength": 1}
    )
    negative_prompt: Text | None = None
    num_images: int = Field(1, ge=1, description="picture i has image_seed + i")
    image_seed: int | None = Field(None, ge=0, le=MAX_SEED)
    guidance_scale: Number | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)


class ImageOptions(DrawOptions):
    image_format: ImageFormat = "png"
    lora_scale: Number = Field(1.0, ge=0, le=2, description="of what the LoRA adds to the base model; 0: nothing")


class EmbeddingsRequest(Request):
    photos: Files = Field(description="photos, base64; of anybody, each answered for itself")


class LatentsRequest(FaceSource):
    """Exactly one of photos and embedding."""

    one_of = ("photos", "embedding")
    num_samples: int = Field(1, ge=1, description="different codes of the same person; sample i has seed + i")


class LorasRequest(AnySource):
    """Exactly one of photos, embedding, latent and lora_file."""

    one_of = ("photos", "embedding", "latent", "lora_file")
    num_samples: int = Field(1, ge=1)
    format: FileFormat | None = Field(None, description="answer with the file itself; only for one sample")
    score: bool = Field(False, description="draw each LoRA once and compare the face with the photo's")


class ImagesRequest(AnySource, ImageOptions):
    """Exactly one of lora, lora_file, latent, embedding and photos."""

    one_of = ("lora", "lora_file", "latent", "embedding", "photos")
    lora: LoRAId | None = None
    reference: Floats | None = Field(
        None, description="embedding that drawn faces are compared with; left out: that of the photos or the embedding"
    )


class PersonalizeRequest(Sampling, ImageOptions):
    photos: Files = Field(description="photos of one person, base64")
    format: FileFormat | None = Field(None, description="put the LoRA file into the answer, too")


class LikenessRequest(FaceSource, DrawOptions):
    """Exactly one of photos and embedding."""

    one_of = ("photos", "embedding")


class EditsRequest(LatentOrLoRA):
    edits: dict[Text, Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)]] = Field(
        min_length=1,
        max_length=32,
        description="attribute (GET /v1/model lists them) -> strength, in standard deviations",
    )
    deviation_scale: Number | None = Field(None, ge=0, le=4)


class InterpolationsRequest(Request):
    """From one person to another. Give num (evenly spaced, ends included) or positions."""

    one_of = ("num", "positions")
    a: LatentOrLoRA
    b: LatentOrLoRA
    num: int | None = Field(None, ge=2)
    positions: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="0 is a, 1 is b"
    )
    deviation_scale: Number | None = Field(None, ge=0, le=4)


class Face(BaseModel):
    box: list[float] = Field(description="x1, y1, x2, y2 in px of the photo, upright")
    keypoints: list[list[float]] = Field(description="eyes, nose, corners of the mouth, px")
    score: float = Field(description="the detector's, 0 to 1")
    embedding: list[float] = Field(description="unit length")


class PhotoFaces(BaseModel):
    width: int
    height: int
    faces: list[Face] = Field(description="largest first; empty if there is none that can be used")
    reason: str | None = Field(None, description="why there is none, as other routes refuse such a photo")
    detail: str | None = None


class EmbeddingsResponse(BaseModel):
    photos: list[PhotoFaces]


class Nearest(BaseModel):
    """Control: how near the person lies to the nearest one that the synthesiser was trained on."""

    similarity: float = Field(description="cosine of the embeddings")


class LeftOut(BaseModel):
    """A photo of another person than most of the photos show: nothing is made of it."""

    photo: str = Field(description="its file name, else its number, such as Photo 2")
    cosine: float = Field(description="of its embedding with the mean of the others")


class SampledLatent(BaseModel):
    latent: Latent
    seed: int


class LatentsResponse(BaseModel):
    latents: list[SampledLatent]
    nearest: Nearest | None = None
    left_out: list[LeftOut] = []


class LoRA(BaseModel):
    id: str
    seed: int | None = Field(None, description="of the latent; none for an upload, an edit or an interpolation")
    position: float | None = Field(None, description="of an interpolation, 0 to 1")
    similarity: float | None = Field(
        None, description="cosine of drawn faces with the photo's; 0 where no face was drawn; none if not asked for"
    )
    nearest: Nearest | None = None
    left_out: list[LeftOut] = []
    expires_in: float = Field(description="seconds until the server forgets it; DELETE its url to have it gone now")
    deletion_token: str | None = Field(
        None, description="to be sent as X-Deletion-Token with DELETE; only of one made now, and without keys"
    )
    url: str
    files: dict[str, str] = Field(description="format -> url")


class LorasResponse(BaseModel):
    loras: list[LoRA]


class Image(BaseModel):
    index: int
    seed: int
    media_type: str
    data: str = Field(description="the picture's file, base64")
    similarity: float | None = Field(None, description="cosine of the drawn face with the photo's, 0 without a face")


class LikenessResponse(BaseModel):
    """Cosines with the photos, on one scale: of faces drawn by the same prompt and seeds (0 without one), and of the photos."""

    base: float = Field(description="without a LoRA: a stranger")
    nearest: float | None = Field(description="with the LoRA of the nearest person in training; none without a table")
    lora: float = Field(description="with the person's own LoRA")
    photos: float | None = Field(description="among the person's photos; none for fewer than two")
    left_out: list[LeftOut] = []


class ImagesResponse(BaseModel):
    lora: LoRA
    images: list[Image]


class LoRAFile(BaseModel):
    name: str
    media_type: str
    data: str = Field(description="base64")


class PersonalizeResponse(ImagesResponse):
    file: LoRAFile | None = None


class ModelResponse(BaseModel):
    """What this server serves."""

    base: dict[str, Any] = Field(description="name, fingerprint, image_size (px), words (null: it knows a language)")
    layout: dict[str, Any] = Field(description="layout_id, rank, alpha, size (floats of a LoRA), target_modules")
    synthesizer: dict[str, Any] = Field(
        description="id, latent_size, embedding_size, attributes (for edits), latent_sampling (recommended)"
    )
    recogniser: str
    people: Literal["rendered", "photographed"] = Field(description="whose photos the recogniser knows")
    identity: dict[str, Any] = Field(
        description="what LoRAs and embeddings of this server belong to: base and recogniser (name, fingerprint), layout_id, "
        "start, recipe_id"
    )
    formats: list[str]
    limits: dict[str, Any]
    defaults: dict[str, Any]
    versions: dict[str, str]
    licence: str


class Status(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457. `reason` is for programs, `detail` for people: it says what to do."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = Field(None, description="where and why, for a request of the wrong form")
