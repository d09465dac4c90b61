"""Answers: LoRAs, files, and pictures in the three ways that a client can ask for them (JSON, one image, events)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.requests import Request

from lora_diffusion.endpoint import schemas
from lora_diffusion.endpoint.problems import ApiError, as_problem
from lora_diffusion.endpoint.studio import Made, Studio
from lora_diffusion.faces.choice import LeftOut
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.messages import FILE_NAMES, DrawnImage, DrawTask, Progress

IMAGE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = re.compile(r"\bq\s*=\s*(0(?:\.\d*)?|1)")
TOKEN_HEADER = "X-LoRA-Deletion-Token"
Wanted = Literal["json", "image", "events"]


def wanted(request: Request) -> Wanted:
    """What the Accept header likes best. Raises ApiError for types that we do not have."""
    accepted: list[tuple[float, str]] = []
    for part in request.headers.get("accept", "*/*").split(","):
        media_type, _, parameters = part.partition(";")
        quality = QUALITY.search(parameters)
        accepted.append((float(quality[1]) if quality else 1.0, media_type.strip().lower()))
    for _, media_type in sorted((a for a in accepted if a[0] > 0), key=lambda a: -a[0]):
        if media_type == "text/event-stream":
            return "events"
        if media_type in ("image/*", *IMAGE_TYPES.values()):
            return "image"
        if media_type in ("", "*/*", "application/*", "application/json", "application/problem+json"):
            return "json"
    raise ApiError("not_acceptable")


def image_format(request: Request, asked: schemas.ImageOptions) -> str:
    """As the body says, else as the Accept header says, else png."""
    if "image_format" not in asked.model_fields_set:
        for name, media_type in IMAGE_TYPES.items():
            if media_type in request.headers.get("accept", "").lower():
                return name
    return asked.image_format


def nearest(made: Made) -> schemas.Nearest | None:
    if made.sampled is None or made.sampled.code.nearest is None:
        return None
    return schemas.Nearest(similarity=made.sampled.code.nearest)


def left_out(photos: Sequence[LeftOut]) -> list[schemas.LeftOut]:
    return [schemas.LeftOut(photo=one.photo, cosine=one.cosine) for one in photos]


def left_out_header(made: Made) -> dict[str, str]:
    """Of an answer that is a file: the photos' names, percent-encoded, in a list."""
    names = [quote(photo.photo) for photo in made.sampled.left_out] if made.sampled else []
    return {"X-LoRA-Left-Out": ", ".join(names)} if names else {}


def lora(
    made: Made, config: ServeConfig, root: str, similarity: float | None = None, position: float | None = None
) -> schemas.LoRA:
    """A LoRA of the library, as JSON. root: what stands before the paths of this server."""
    url = f"{root}/v1/loras/{made.decoded.lora_id}"
    kept = made.record.expires_in if made.record else None
    return schemas.LoRA(
        id=made.decoded.lora_id,
        seed=made.sampled.seed if made.sampled else None,
        position=position,
        similarity=similarity,
        nearest=nearest(made),
        left_out=left_out(made.sampled.left_out) if made.sampled else [],
        expires_in=config.library.ttl_seconds if kept is None else round(kept, 3),
        deletion_token=made.token or None,
        url=url,
        files={name: f"{url}?format={name}" for name in FILE_NAMES},
    )


def file(made: Made, format: str, similarity: float | None = None) -> Response:
    """A LoRA as a download."""
    assert made.decoded.file is not None
    name, media_type = FILE_NAMES[format]
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-LoRA-Id": made.decoded.lora_id}
    if made.token:
        headers[TOKEN_HEADER] = made.token
    headers |= left_out_header(made)
    if similarity is not None:
        headers["X-LoRA-Similarity"] = f"{similarity:.4f}"
    if made.sampled is not None and made.sampled.seed is not None:
        headers["X-LoRA-Seed"] = str(made.sampled.seed)
    return Response(made.decoded.file, 200, headers, media_type)


class Pictures:
    """The pictures of one task, drawn for one client."""

    def __init__(
        self, studio: Studio, made: Made, task: DrawTask, deadline: float, root: str = "", format: str | None = None
    ) -> None:
        self._studio = studio
        self._made = made
        self._task = task
        self._deadline = deadline
        self._root = root
        self._format = format

    async def answer(self, how: Wanted) -> Any:
        if how == "events":
            return await self._events()
        images = [self._image(event) async for event in self._drawn() if isinstance(event, DrawnImage)]
        if how == "json":
            return self._whole(sorted(images, key=lambda image: image.index))
        headers = {"X-Image-Seed": str(images[0].seed), "X-LoRA-Id": self._made.decoded.lora_id}
        if self._made.token:
            headers[TOKEN_HEADER] = self._made.token
        headers |= left_out_header(self._made)
        if images[0].similarity is not None:
            headers["X-LoRA-Similarity"] = f"{images[0].similarity:.4f}"
        return Response(base64.b64decode(images[0].data), 200, headers, images[0].media_type)

    def _drawn(self) -> AsyncGenerator[Progress | DrawnImage, None]:
        return self._studio.draw(self._task, self._deadline)

    def _image(self, drawn: DrawnImage) -> schemas.Image:
        return schemas.Image(
            index=drawn.index,
            seed=self._task.seeds[drawn.index],
            media_type=IMAGE_TYPES[self._task.image_format],
            data=base64.b64encode(drawn.data).decode(),
            similarity=drawn.similarity,
        )

    def _whole(self, images: list[schemas.Image]) -> schemas.PersonalizeResponse:
        scores = [image.similarity for image in images if image.similarity is not None]
        similarity = float(np.mean(scores)) if scores else None
        content = self._made.decoded.file
        return schemas.PersonalizeResponse(
            lora=lora(self._made, self._studio.config, self._root, similarity),
            images=images,
            file=None if content is None or self._format is None else _file_of(content, self._format),
        )

    async def _events(self) -> StreamingResponse:
        """The first event is awaited here, so that what is refused is refused with its status."""
        events = self._drawn()
        try:
            first = await anext(events)
        except StopAsyncIteration:  # pragma: no cover: a task has at least one picture
            raise AssertionError("a task without pictures") from None
        return StreamingResponse(self._stream(first, events), media_type="text/event-stream", headers=NO_BUFFERING)

    async def _stream(
        self, first: Progress | DrawnImage, events: AsyncGenerator[Progress | DrawnImage, None]
    ) -> AsyncIterator[bytes]:
        images = []
        try:
            yield event("lora", lora(self._made, self._studio.config, self._root))
            async for item in _chain(first, events):
                if isinstance(item, DrawnImage):
                    image = self._image(item)
                    images.append(image.model_copy(update={"data": ""}))
                    yield event("image", image)
                else:
                    yield event("progress", {"done": item.done, "total": item.total})
            yield event("done", self._whole(sorted(images, key=lambda image: image.index)))
        except Exception as error:
            problem = as_problem(error, self._studio.config.limits.retry_after_seconds)
            if problem is None:
                problem = ApiError("internal_error", "The pictures could not be drawn: an error of ours. Try again.")
            yield event("problem", problem.document())
        finally:
            await events.aclose()


NO_BUFFERING = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(name: str, data: BaseModel | dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data)
    return f"event: {name}\ndata: {text}\n\n".encode()


async def _chain(
    first: Progress | DrawnImage, rest: AsyncIterator[Progress | DrawnImage]
) -> AsyncIterator[Progress | DrawnImage]:
    yield first
    async for item in rest:
        yield item


def _file_of(content: bytes, format: str) -> schemas.LoRAFile:
    name, media_type = FILE_NAMES[format]
    return schemas.LoRAFile(name=name, media_type=media_type, data=base64.b64encode(content).decode())
