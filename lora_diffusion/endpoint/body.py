"""The body of a request, read within bounds: JSON or multipart/form-data into names and values."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from email.message import Message
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lora_diffusion.endpoint.access import SLOW_BODIES, SLOW_SECONDS
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.endpoint.schemas import Upload, from_base64
from lora_diffusion.serving.config import LimitsConfig

# In a form these names hold JSON text.
JSON_FIELDS = frozenset({"embedding", "reference", "latent", "edits", "a", "b", "positions"})
PHOTO_FIELDS = ("photo", "photos", "photo[]", "photos[]")
MAX_VALUES, MAX_NAMES = 100_000, 256  # of a body, and of an object in it: far more than any request has
MAX_DIGITS, MAX_TYPE = (
    400,
    1000,
)  # of a whole number; of the header Content-Type: to parse either takes the square of its length
Watched = Callable[[asyncio.Timeout], AbstractContextManager[None]]
CHUNK = 500_000  # bytes of a form, parsed in about 10 ms
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_values(request: Request, limits: LimitsConfig, watched: Watched) -> dict[str, Any]:
    """watched: lets go on, or ends. Raises ApiError: too large, too slow, of another media type or coding, or malformed."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")[:MAX_TYPE]
    media_type = header.get_content_type() if header["content-type"] else "of no type"
    charset = header.get_content_charset("utf-8")
    if media_type not in ("application/json", "multipart/form-data"):
        raise ApiError(
            "unsupported_media_type",
            f"The body is {media_type}; send application/json, or multipart/form-data with the photo as a file.",
        )
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError("unsupported_media_type", f"The body is in {charset}; send it in UTF-8.")
    data = await read_body(request, limits, watched)
    values = _json(data) if media_type == "application/json" else await _form(request, data, limits)
    if not isinstance(values, dict):
        raise ApiError("malformed_body", "The JSON body must be an object of names and values.")
    left: list[dict[str, Any]] = [values]
    while left:
        part = left.pop()
        if len(part) > MAX_NAMES:
            raise ApiError("body_too_large", f"An object in the body has more than {MAX_NAMES} names.")
        left += (value for value in part.values() if isinstance(value, dict))
    return values


async def read_body(request: Request, limits: LimitsConfig, watched: Watched) -> bytes:
    """At most `max_body_bytes`, told from the header or as soon as they are exceeded, and within `body_seconds`."""
    too_large = ApiError(
        "body_too_large",
        f"At most {limits.max_body_bytes / 1e6:g} MB are accepted. Scale the photos down, or send fewer.",
    )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip"):
        raise ApiError(
            "unsupported_media_type",
            f"The body is encoded as {coding}; send it as it is, or with gzip.",
            headers={"Accept-Encoding": "gzip, identity"},
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds) as timeout:
            with watched(timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limits.max_body_bytes:
                        raise too_large
    except TimeoutError:
        within = (
            f"within {limits.body_seconds:g} s, or within {2 * SLOW_SECONDS:g} s beside {SLOW_BODIES} others of yours"
        )
        raise ApiError("slow_body", f"The body did not arrive {within}. Send fewer at a time.") from None
    if coding == "identity":
        return bytes(data)
    unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        plain = unzip.decompress(data, limits.max_body_bytes + 1)
    except zlib.error:
        raise ApiError("malformed_body", "The body is said to be gzip, and is not.") from None
    if len(plain) > limits.max_body_bytes:
        raise too_large
    if not unzip.eof:
        raise ApiError("malformed_body", "The gzip body is cut short.")
    return plain


def _json(data: bytes) -> Any:
    """Refuses what would take seconds to parse or to check before it is parsed: nobody else is answered meanwhile."""
    if data.count(b",") > MAX_VALUES:
        raise ApiError("body_too_large", f"The JSON holds more than {MAX_VALUES:,} values.")
    try:
        values = json.loads(data, parse_constant=_no_constant, parse_int=_whole_number)
        if SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except json.JSONDecodeError as error:
        what = f"{error.msg}, at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        what = "it is not UTF-8"
    except UnicodeEncodeError:
        what = "a text in it holds half of a surrogate pair"
    except RecursionError:
        what = "it is nested too deeply"
    except NoJSON as error:
        what = str(error)
    raise ApiError("malformed_body", f"The body is no valid JSON: {what}.")


class NoJSON(ValueError):
    """A number that Python writes and JSON does not know, or one that nobody needs."""


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NoJSON("a number in it has too many digits")
    return int(text)


def _no_constant(name: str) -> None:
    raise NoJSON(f"{name} is no number there")


async def _form(request: Request, data: bytes, limits: LimitsConfig) -> dict[str, Any]:
    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(data), CHUNK):  # others are answered in between
            yield data[start : start + CHUNK]
            await asyncio.sleep(0)

    try:
        parser = MultiPartParser(
            request.headers,
            stream(),  # type: ignore[arg-type]
            max_files=limits.max_photos + 2,
            max_fields=64,
            max_part_size=limits.max_body_bytes,
        )
        parser.spool_max_size = limits.max_body_bytes + 1  # no photo comes to a disk
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = error.message if isinstance(error, MultiPartException) else type(error).__name__
        raise ApiError("malformed_body", f"The multipart body cannot be read: {message}") from None
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        content: Any = Upload(await value.read(), value.filename or "") if isinstance(value, UploadFile) else value
        if name in PHOTO_FIELDS:
            values.setdefault("photos", []).append(content if isinstance(content, Upload) else _photo(content))
        elif name in values:
            raise ApiError("malformed_body", "The multipart body has two parts of one name that may be there once.")
        elif name in JSON_FIELDS:
            values[name] = _json(content.data if isinstance(content, Upload) else content.encode("utf-8", "replace"))
        elif name == "lora_file":
            values[name] = content if isinstance(content, Upload) else _photo(content)
        else:
            values[name] = content.data if isinstance(content, Upload) else content
    return values


def _photo(text: str) -> Upload:
    """Of a part without a file name: base64, or the file's own bytes, which were read as Latin-1 as they are not UTF-8."""
    try:
        return from_base64(text)
    except ValueError:
        return Upload(text.encode("latin-1", "replace"))
