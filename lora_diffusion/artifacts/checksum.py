"""SHA-256 in the files that we write: a changed byte is an error with the file's name, not another number.

safetensors: `sha256` in the header's metadata, over the rest of the header and the data, and `checksum`, which says so: no
single damage hides that there is one. Parquet: 32 bytes before the footer, where no reader looks, over all other bytes; the pages
have checksums of their own, which every reader can compare. JSON: both keys beside the others; who edits the file takes them out.
Files without one (of earlier releases, of other programs) pass. LoRA files carry ModelSpec's checksum instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"
PARQUET_MARK = b"SHA-256 of all other bytes:"


def seal(file: bytes) -> bytes:
    """A safetensors file with its checksum in the header."""
    header, data = _split(file)
    metadata = {**header.pop("__metadata__", {}), "checksum": KEY}
    header = {"__metadata__": {**metadata, KEY: _digest(header, metadata, data)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, data])


def check(file: bytes) -> bool:
    """Whether a safetensors file was sealed. Raises ValueError if it is not what was sealed, or none at all."""
    header, data = _split(file)
    metadata = header.pop("__metadata__", {})
    if not {KEY, "checksum"} & metadata.keys():
        return False
    if metadata.pop(KEY, "") != _digest(header, metadata, data):
        raise ValueError("its content has another checksum than its header says")
    return True


def notes(file: bytes) -> dict[str, Any]:
    """What the header of a safetensors file says beside its tensors. Raises ValueError if it is none."""
    metadata: dict[str, Any] = _split(file)[0].get("__metadata__", {})
    return metadata


def _split(file: bytes) -> tuple[dict[str, Any], memoryview]:
    size = int.from_bytes(file[:8], "little")
    try:
        header = json.loads(file[8 : 8 + size])
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    if len(file) < 8 + size or not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("it has no header of a safetensors file")
    return header, memoryview(file)[8 + size :]


def _digest(header: dict[str, Any], metadata: dict[str, Any], data: memoryview) -> str:
    digest = _canonical([header, metadata])
    digest.update(data)
    return digest.hexdigest()


def _canonical(value: Any) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def seal_json(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum."""
    return {**values, "checksum": KEY, KEY: _canonical(values).hexdigest()}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without its checksum."""
    return {key: value for key, value in values.items() if key not in ("checksum", KEY)}


def check_json(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object was sealed. Raises ValueError if it is not what was sealed."""
    if not {KEY, "checksum"} & values.keys():
        return False
    if values.get(KEY) != _canonical(unsealed(values)).hexdigest():
        raise ValueError("its content has another checksum than it was written with: it was damaged, or edited by hand")
    return True


def seal_parquet(file: bytes) -> bytes:
    """A Parquet file with a checksum over all of it. Its footer must hold PARQUET_MARK, too, as said above."""
    start = _footer(file)
    return b"".join([file[:start], PARQUET_MARK, hashlib.sha256(file).digest(), file[start:]])


def check_parquet(file: bytes) -> bool:
    """Whether a Parquet file was sealed. Raises ValueError if it is not what was sealed."""
    if PARQUET_MARK not in file:
        return False
    view, end = memoryview(file), _footer(file)
    digest = hashlib.sha256(view[: end - 32 - len(PARQUET_MARK)])
    digest.update(view[end:])
    if view[end - 32 - len(PARQUET_MARK) : end] != PARQUET_MARK + digest.digest():
        raise ValueError("its content has another checksum than it was written with")
    return True


def _footer(file: bytes) -> int:
    """Where the footer begins. Raises ValueError if there is none."""
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    if file[-4:] != b"PAR1" or start < 4:
        raise ValueError("it has no footer of a Parquet file")
    return start
