"""LoRA files in and out, in memory: nothing that a client sends names a file here.

Axes: N length of a LoRA vector, Z code of the synthesiser.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from lora_diffusion.artifacts import checksum
from lora_diffusion.lora import formats
from lora_diffusion.lora.foreign import PEFT_CONFIG
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Code, Floats

PEFT_WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000


def encode_file(vector_N: Floats, layout: LoRALayout, format: str, metadata: dict[str, str]) -> bytes:
    """The file of a LoRA."""
    return formats.to_bytes(torch.from_numpy(np.array(vector_N)), layout, format, metadata=metadata)  # type: ignore[arg-type]


def encode_latent(code: Code, metadata: dict[str, str]) -> bytes:
    """The code as a file of its own: small, and enough to make the LoRA again with the synthesiser that made it."""
    header = {"format": "lora-diffusion-latent", "format_version": "1", "model": code.model_id}
    return checksum.seal(
        formats.serialise({"latent": torch.from_numpy(np.array(code.values_Z))}, {**header, **metadata})
    )


def decode_file(data: bytes, layout: LoRALayout) -> Floats:
    """The vector (N,) of an uploaded LoRA: safetensors, or a zip of peft's two files. Raises ServingError "bad_lora"."""
    try:
        with tempfile.TemporaryDirectory(prefix="lora") as folder:
            source = _unpack(data, Path(folder)) if data[:4] == b"PK\x03\x04" else Path(folder) / "lora.safetensors"
            if source.suffix:
                source.write_bytes(data)
            return np.asarray(formats.load(source, layout), np.float32)
    except ServingError:
        raise
    except Exception as error:  # hostile headers meet the parsers with many kinds of error
        text = str(error).replace(folder, "").lstrip("/") if isinstance(error, ValueError) else type(error).__name__
        raise ServingError("bad_lora", f"The file is no LoRA for this base model: {text}") from None


def _unpack(data: bytes, folder: Path) -> Path:
    """Only peft's two names, only as large as they may be; whatever else is in the archive is never touched."""
    limits = {PEFT_WEIGHTS: 4 * len(data) + MAX_CONFIG_BYTES, PEFT_CONFIG: MAX_CONFIG_BYTES}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name, limit in limits.items():
            try:
                with archive.open(name) as member:
                    content = member.read(limit + 1)
            except KeyError:
                raise ServingError("bad_lora", f"The zip has no {name}; it should hold peft's two files.") from None
            if len(content) > limit:
                raise ServingError("bad_lora", f"{name} in the zip is larger than it can be.")
            (folder / name).write_bytes(content)
    return folder
