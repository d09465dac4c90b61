"""Hostile bytes made of good ones: mutations that know JSON, safetensors and HTTP, and checksums that fit again afterwards.

`Reader`: what is to be read, and how; `hostile.py` has them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load, save

from lora_diffusion.artifacts import checksum
from lora_diffusion.lora import container
from lora_diffusion.training.checkpoint import CHECKSUM


@dataclass(frozen=True)
class Reader:
    """`read(folder, data)` puts the bytes where a user would, and reads them. `seeds(folder)`: whole ones.

    `whole`: reads them with all that lies beside them as well, for some cases; a million would take days.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    prepare: Callable[[Path], object] = lambda folder: None
    change: str = "bytes"  # or json, safetensors, http: what the mutations know
    whole: Callable[[Path, bytes], object] | None = None


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.unlink(missing_ok=True)  # the one before may still be mapped
    path.write_bytes(data)
    return path


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53, 2**63, 10**40, -(2**63), 0.5, -0.0, 1e308, float("nan")),
    *("", "a", "../x", "/etc/passwd", "\0", "\ud800", "é" * 50, "F32", "[" * 2000, [], {}, [[]], {"": {}}, [0, 1]),
)


def mutate(random: Random, data: bytes, change: str) -> bytes:
    """One to four changes, a third of them plain noise on the bytes, whatever `change` is.

    In half of the cases the checksum is set right afterwards: what reads the content is reached, not only what compares.
    """
    for _ in range(random.randint(1, 4)):
        kind = change if change == "text" or random.random() < 0.67 else "bytes"
        data = KINDS[kind](random, data)
    return sealed(data) if random.random() < 0.5 else data


def sealed(data: bytes) -> bytes:
    """With the checksum of what it holds now, if it has one and still can have."""
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        if data[:4] == b"PAR1":
            end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
            begin = end - 32 - len(checksum.PARQUET_MARK)
            if data[max(0, begin) : end - 32] == checksum.PARQUET_MARK:
                return checksum.seal_parquet(data[:begin] + data[end:])
        elif data[:1] == b"{":
            values = json.loads(data)
            if checksum.KEY in values:
                return json.dumps(checksum.seal_json(checksum.unsealed(values))).encode()
        else:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            metadata = header["__metadata__"]
            if CHECKSUM in header:
                return data[:-32] + hashlib.sha256(data[:-32]).digest()
            if container.CHECKSUM in metadata:
                metadata[container.CHECKSUM] = container.checksum(memoryview(data)[8 + size :])
                return _file(header, data[8 + size :])
            if metadata.pop(checksum.KEY, None):
                return checksum.seal(_file(header, data[8 + size :]))
    return data


def plain(data: bytes, change: str) -> list[bytes]:
    """As an earlier release or another program wrote it, without checksums; Parquet also without compression."""
    if change == "safetensors":
        return [save(load(data), {"format": "pt"})]
    if change == "json":
        return [json.dumps(checksum.unsealed(json.loads(data))).encode()]
    table, files = pq.read_table(pa.BufferReader(data)), []
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"checksum"}
    for compression in ("zstd", "none"):
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression=compression)
        files.append(sink.getvalue().to_pybytes())
    return files


def _file(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _bytes(random: Random, data: bytes, deep: int = 3000) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 64, 1000)))
    what = random.randrange(7)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[end:]
    if what == 2:
        return data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
    if what == 3:
        return data[:at] + random.randbytes(end - at) + data[end:]
    if what == 4:
        number = random.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
        return data[:at] + number.to_bytes(8, random.choice(("little", "big")))[: end - at] + data[end:]
    if what == 5 and end - at == 1:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[end:]
    return (
        data[:at]
        + random.choice((b"[" * deep, b'{"a":' * (deep // 3), b"0", b"-", b"9" * 30, b"\xff", b"\n"))
        + data[end:]
    )


def _text(random: Random, data: bytes) -> bytes:
    """Less deep: the time to parse YAML grows with the square of its depth."""
    return _bytes(random, data, 100)


def _json(random: Random, data: bytes) -> bytes:
    try:
        return json.dumps(_tree(random, json.loads(data))).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return _bytes(random, data)


def _tree(random: Random, value: Any) -> Any:
    """The value with one node replaced, taken out, or put in twice."""
    if random.random() < 0.15 or not value or not isinstance(value, dict | list):
        return random.choice(VALUES)
    if isinstance(value, list):
        at = random.randrange(len(value))
        if random.random() < 0.3:
            return value[:at] + value[at + 1 :] if random.random() < 0.5 else [*value, value[at]]
        return [*value[:at], _tree(random, value[at]), *value[at + 1 :]]
    key, other = random.choice(list(value)), random.choice(list(value))
    what = random.random()
    if what < 0.15:
        return {name: inner for name, inner in value.items() if name != key}
    if what < 0.3:
        return {(other + "x" if name == key else name): inner for name, inner in value.items()}
    if what < 0.4:
        return {**value, key: value[other]}
    return {**value, key: _tree(random, value[key])}


def _safetensors(random: Random, data: bytes) -> bytes:
    """A changed header with its length set right; metadata that is JSON itself is changed inside."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        texts = [key for key, text in header["__metadata__"].items() if text[:1] in "{["]
        if texts and random.random() < 0.5:
            key = random.choice(texts)
            header["__metadata__"][key] = json.dumps(_tree(random, json.loads(header["__metadata__"][key])))
        else:
            header = _tree(random, header)
        return _file(header, data[8 + size :])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _bytes(random, data)


def _http(random: Random, data: bytes) -> bytes:
    """The JSON body of a request, or one of its lines put twice, taken out, or into another's place."""
    head, gap, body = data.partition(b"\r\n\r\n")
    if body and random.random() < 0.6:
        return head + gap + _json(random, body)
    lines = head.split(b"\r\n")
    at, what = random.randrange(len(lines)), random.random()
    line = _bytes(random, lines[at]).replace(b"\r\n", b"") if what < 0.6 else random.choice(lines)
    return b"\r\n".join([*lines[:at], *([line] if what < 0.8 else [line, lines[at]]), *lines[at + 1 :]]) + gap + body


KINDS = {"bytes": _bytes, "text": _text, "json": _json, "safetensors": _safetensors, "http": _http}
