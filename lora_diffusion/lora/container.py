"""A safetensors file in memory: text of its header, its data, a checksum over the data; and back.

Only safetensors is read, never a pickle. What comes from outside raises ValueError whatever its bytes are.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the library opens no file with more
CHECKSUM = "modelspec.hash_sha256"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

Part = tuple[str, torch.dtype, tuple[int, ...]]
"""Key, dtype and shape of one tensor."""


def members(parts: Iterable[Part]) -> str:
    """The header's JSON members of tensors that lie one after the other."""
    found, end = {}, 0
    for key, dtype, shape in parts:
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        found[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(found, separators=(",", ":"))[1:-1]


def file(tensors: str, metadata: Mapping[str, str], *data: bytes | memoryview) -> bytes:
    """A whole file. `tensors`: what `members` gives for `data`. Raises ValueError if the header is too long to be read."""
    text = f'{{"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}{"," * bool(tensors)}{tensors}}}'
    text += " " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"metadata of {len(text):,} bytes: no program opens a file with more than {MAX_HEADER:,}")
    return b"".join([len(text).to_bytes(8, "little"), text.encode(), *data])


def checksum(*data: bytes | memoryview) -> str:
    """As https://github.com/Stability-AI/ModelSpec has it: SHA-256 of all tensors' bytes."""
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    return f"0x{digest.hexdigest()}"


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file as the library writes it (larger dtypes first, so that all are aligned), with its metadata in a fixed order."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    parts = [(key, tensors[key].dtype, tuple(tensors[key].shape)) for key in order]
    return file(members(parts), metadata, *(bytes_of(tensors[key]) for key in order))


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def parse(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises ValueError for whatever is none."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # unknown dtypes, cut data, no UTF-8, nesting without end: each has its own class there
        text = str(error) or type(error).__name__
        raise ValueError(
            f"{source} is not a safetensors file ({text[:300]}). Pickles (.bin, .pt, .ckpt) are never loaded, since loading "
            "one runs its code: convert a file that you trust with safetensors.torch.save_file"
        ) from error
    return tensors, header.get("__metadata__") or {}


def check_data(data: bytes, metadata: Mapping[str, str], source: str) -> None:
    """Raises ValueError if the tensors are not those that the header's checksum was made of."""
    begin = 8 + int.from_bytes(data[:8], "little")
    expected = metadata.get(CHECKSUM)
    if expected is not None and checksum(memoryview(data)[begin:]) != expected:
        raise ValueError(
            f"{source} is damaged: its data has another checksum than its header says. Copy or make it again"
        )


def text_values(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A header holds text only: numbers become text, lists and mappings JSON.

    Raises ValueError for other values, and for text that is no UTF-8 (half of a surrogate pair).
    """
    values = {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | list | tuple | Mapping):
            raise ValueError(f"metadata {key!r}: {type(value).__name__}; a file's header holds text: pass a str")
        try:
            values[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=dict)
            f"{key}{values[key]}".encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"metadata {key!r} cannot be written as text: {error}") from error
    return values


def json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Raises ValueError if `text` is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a {type(value).__name__}, expected a JSON object")
    return value
