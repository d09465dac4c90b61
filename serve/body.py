"""The body of a request, read within bounds and checked: JSON or multipart/form-data into one schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lora_diffusion.serving.config import LimitsConfig
from serve.problems import ApiError, invalid

Schema = TypeVar("Schema", bound=BaseModel)
# In a form these names hold JSON text.
JSON_FIELDS = frozenset({"embedding", "latent", "edits", "a", "b", "positions"})


async def read_request(request: Request, schema: type[Schema], limits: LimitsConfig) -> Schema:
    """Raises ApiError: too large, too slow, of another media type, malformed, or not as `schema` says."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", "multipart/form-data"):
        raise ApiError(
            "unsupported_media_type",
            f"The body is {media_type or 'of no type'}; send application/json, or multipart/form-data with the photo as a file.",
        )
    data = await read_body(request, limits)
    values = _json(data) if media_type == "application/json" else await _form(request, data, limits)
    if not isinstance(values, dict):
        raise ApiError("malformed_body", "The JSON body must be an object of names and values.")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise invalid(error, schema) from None


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """At most `max_body_bytes`, told from the header or as soon as they are exceeded, and within `body_seconds`."""
    too_large = ApiError(
        "body_too_large",
        f"At most {limits.max_body_bytes / 1e6:g} MB are accepted. Scale the photos down, or send fewer.",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError("slow_body", f"The body did not arrive within {limits.body_seconds:g} s.") from None
    return bytes(data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        what = f"{error.msg}, at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        what = "it is not UTF-8"
    except RecursionError:
        what = "it is nested too deeply"
    except ValueError as error:
        what = str(error) if isinstance(error, NoJSON) else "a number in it has too many digits"
    raise ApiError("malformed_body", f"The body is no valid JSON: {what}.")


class NoJSON(ValueError):
    """A number that Python writes and JSON does not know."""


def _no_constant(name: str) -> None:
    raise NoJSON(f"{name} is no number there")


async def _form(request: Request, data: bytes, limits: LimitsConfig) -> dict[str, Any]:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    try:
        parser = MultiPartParser(
            request.headers,
            stream(),  # type: ignore[arg-type]
            max_files=limits.max_photos + 2,
            max_fields=64,
            max_part_size=limits.max_body_bytes,
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = error.message if isinstance(error, MultiPartException) else type(error).__name__
        raise ApiError("malformed_body", f"The multipart body cannot be read: {message}") from None
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        content: Any = await value.read() if isinstance(value, UploadFile) else value
        if name in ("photo", "photos"):
            content = content.encode("utf-8", "replace") if isinstance(content, str) else content
            values.setdefault("photos", []).append(content)
        elif name in JSON_FIELDS and isinstance(content, str):
            values[name] = _json(content.encode("utf-8", "replace"))
        else:
            values[name] = content
    return values
