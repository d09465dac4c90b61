"""Dataclasses of arrays and plain values <-> bytes (safetensors), to travel between processes as a column of bytes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy

T = TypeVar("T")
_PLAIN = "plain.json"


def pack(item: Any) -> bytes:
    """`item`: a dataclass whose fields are arrays or JSON values."""
    values = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    tensors = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    tensors[_PLAIN] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    return bytes(safetensors.numpy.save(tensors))


def unpack(cls: type[T], data: bytes) -> T:
    """Inverse of `pack`."""
    tensors = safetensors.numpy.load(data)
    plain = json.loads(tensors.pop(_PLAIN).tobytes())
    return cls(**tensors, **plain)
