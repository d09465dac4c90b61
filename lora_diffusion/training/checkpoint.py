"""A checkpoint is one safetensors file with JSON in its header: written one tensor at a time, whole or not at all.

No pickle. Tensors have dotted names (`model.*`, `optimizer.*`), everything else is `meta`. The last tensor, `sha256`, is the
checksum of all bytes before it: the header is written first, when it is not known yet.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.storage import Buffer, Store
from lora_diffusion.training.distributed import whole

_FREE_TO_CHANGE = ("checkpoint_every", "log_every")  # on resume: they change no loss
_UNKNOWN_BEFORE = {"keep": "best"}  # what checkpoints of earlier releases do not say
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
CHECKSUM = "sha256"
_MAX_HEADER = 100_000_000  # bytes, as safetensors has it


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as flat tensors, `{parameter index}.{name}`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, on an optimiser over the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pieces(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Iterator[Buffer]:
    """A safetensors file with `meta`, JSON, in its header: the header, then one tensor after the other, made whole."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"checksum": CHECKSUM, "meta": json.dumps(meta)}}
    end = 0
    for key in order:
        begin, end = end, end + tensors[key].nbytes
        dtype = next(name for name, dtype in _DTYPES.items() if dtype == tensors[key].dtype)
        header[key] = {"dtype": dtype, "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    digest = hashlib.sha256()
    header[CHECKSUM] = {"dtype": "U8", "shape": [digest.digest_size], "data_offsets": [end, end + digest.digest_size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest.update(head)
    yield head
    for key in order:
        data = whole(tensors[key]).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(data)
        yield data
    yield digest.digest()


def pack(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    return b"".join(pieces(tensors, meta))


class SavedTensors:
    """A file of `pieces`, read one tensor at a time. Raises ValueError if it is damaged."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self._head = store.read_part(name, 0, 8)
        size = int.from_bytes(self._head, "little")
        with self.readable():
            if size > _MAX_HEADER:
                raise ValueError(f"its header would be {size:,} bytes long")
            self._head += store.read_part(name, 8, size)
            header = json.loads(self._head[8:])
            notes = header.pop("__metadata__")
            self.meta: dict[str, Any] = json.loads(notes["meta"])
            if "checksum" in notes and CHECKSUM not in header:
                raise ValueError("it lacks its checksum")
            found = {key: (_DTYPES[of["dtype"]], of["shape"], *of["data_offsets"]) for key, of in header.items()}
            self._where = dict(sorted(found.items(), key=lambda item: item[1][2:]))  # as they lie
            for key, (dtype, shape, begin, end) in self._where.items():
                whole_numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
                if not whole_numbers or math.prod(shape) * dtype.itemsize != end - begin:
                    raise ValueError(f"its header gives {key} {end - begin} bytes for the shape {shape}")

    @classmethod
    def find(cls, store: Store, name: str) -> SavedTensors | None:
        """None where there is no such file."""
        try:
            return cls(store, name)
        except FileNotFoundError:
            return None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as they lie. A wrong checksum is known at the end: what came before is not to be used then."""
        digest = hashlib.sha256(self._head)
        for key, (dtype, shape, begin, end) in self._where.items():
            with self.readable():
                data = bytearray(self.store.read_part(self.name, len(self._head) + begin, end - begin))
                if len(data) < end - begin:
                    raise ValueError("it ends early")
                if key == CHECKSUM:
                    if data != digest.digest():
                        raise ValueError("its content has another checksum than it was written with")
                    continue
                digest.update(data)
                tensor = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
            yield key, tensor

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, whatever a damaged file makes of what is read is a ValueError with its name."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.store.uri}/{self.name} cannot be read ({type(error).__name__}: {error}). Delete it: the same "
                "command makes it anew"
            ) from error


def unpack(store: Store, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Inverse of `pack`, or None where there is no such file. Raises ValueError if it is damaged."""
    saved = SavedTensors.find(store, name)
    return None if saved is None else (dict(saved), saved.meta)


def differences(there: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What of two settings is not the same, one line each: `vae.kl_weight: 0.5 there, 0.1 now`."""
    lines = []
    for key in sorted({*there, *now} - set(_FREE_TO_CHANGE)):
        a, b = there.get(key, _UNKNOWN_BEFORE.get(key)), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} there, {b!r} now")
    return lines
