"""A LoRA vector as a file that other programs load, and back, bit for bit.

| format    | what is written                                            | who loads it                               |
|-----------|------------------------------------------------------------|--------------------------------------------|
| diffusers | `pytorch_lora_weights.safetensors`                         | `pipe.load_lora_weights`, diffusers 0.34+  |
| peft      | folder: `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(unet, folder)`  |
| kohya     | one `.safetensors`, `lora_unet_*` keys with alpha          | A1111, Forge, ComfyUI, `load_lora_weights` |
| vector    | one `.safetensors`, the flat vector and its layout         | this package                               |

Rows of weights2weights' corpus are plain tensors: `from_weights2weights`, `to_weights2weights`.
Only safetensors and JSON are read, never a pickle. `docs/reference/formats.md` has the contents; key names lie in `foreign.py`.

Axes: N vector length, R rank, I / O features in / out.
"""

import functools
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from uuid import uuid4

import numpy.typing as npt
import safetensors
import torch
from torch import Tensor

from lora_diffusion.lora import foreign
from lora_diffusion.lora.layout import LoRALayout

Format = Literal["diffusers", "peft", "kohya", "vector"]
FORMATS: tuple[str, ...] = get_args(Format)
FORMAT_VERSION = "1"
W2W_ALPHA = 27.0
"""alpha of every LoRA in weights2weights' corpus (their rank is 1, so the scale is 27 too)."""

Vector: TypeAlias = Tensor | npt.NDArray[Any]
_FILE_NAMES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "kohya": "lora.safetensors",
    "vector": "vector.safetensors",
}
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def save(
    vector_N: Vector,
    layout: LoRALayout,
    path: str | os.PathLike[str],
    format: Format = "diffusers",
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one vector (N,) and return what to give to the loader: the file, or for peft the folder.

    A path that ends in `.safetensors` is the file; any other is a folder, made if need be. `metadata` (identity, base
    model, licence, ...) goes into the file's header. `dtype=torch.float16` halves the file, at the price of exactness.

    Raises:
        ValueError: wrong shape or format, values that are not finite, a peft path that is not a folder.
    """
    target = Path(path)
    files = _encode(vector_N, layout, format, dtype, metadata)
    if target.suffix == ".safetensors":
        if format == "peft":
            raise ValueError(f"{target}: peft wants a folder for its two files; give a path without .safetensors")
        files = {target.name: files[_FILE_NAMES[format]]}
        target = target.parent
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        _write_whole(target / name, data)
    return target if format == "peft" else target / next(iter(files))


def to_bytes(
    vector_N: Vector,
    layout: LoRALayout,
    format: Format = "diffusers",
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What `save` would write, in memory: a safetensors file, or for peft a zip of the folder's two files.

    Equal arguments give equal bytes. Raises `ValueError` as `save` does.
    """
    files = _encode(vector_N, layout, format, dtype, metadata)
    if format != "peft":
        return files[_FILE_NAMES[format]]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # A bare ZipInfo carries a fixed date, not today's.
    return buffer.getvalue()


def load(path: str | os.PathLike[str], layout: LoRALayout | None = None, *, rescale: bool = False) -> Tensor:
    """The vector (N,), float32, of a file or folder in any of the formats; its keys tell which.

    `layout` may be left out for our own `vector` files, which carry theirs. A file with another alpha is refused,
    unless `rescale=True`, which multiplies its B matrices so that the update stays what it was.

    Raises:
        ValueError: no LoRA there, or one that does not fit the layout: foreign, missing or mis-shaped tensors,
            another alpha, values that are not finite, a variant of LoRA that a vector cannot hold.
    """
    source = _find(Path(path))
    tensors, metadata = _read(source)
    if set(tensors) == {"vector"}:
        own = _layout_in(metadata, source)
        layout = layout or own
        if (own.entries, own.rank) != (layout.entries, layout.rank):
            raise ValueError(
                f"{source} was made for layout {own.layout_id} (rank {own.rank}, N {own.size}); the layout given is "
                f"{layout.layout_id} (rank {layout.rank}, N {layout.size}). Use read_layout(path), or a LoRA of this "
                "base model and rank"
            )
        matrices = _split(_as_vector(tensors["vector"], own), own)
        alphas = dict.fromkeys(matrices, own.alpha)
    elif layout is None:
        raise ValueError(f"{source} holds no layout; pass the one of your UNet: load(path, layout)")
    else:
        matrices, alphas = foreign.decode(tensors, metadata, layout, source)

    joined = {}
    for name, (A_RI, B_OR) in matrices.items():
        # Files in half precision may have rounded alpha too.
        if not math.isclose(alphas[name], layout.alpha, rel_tol=max(1e-6, torch.finfo(A_RI.dtype).eps)):
            if not rescale:
                raise ValueError(
                    f"{source}: {name} has alpha {alphas[name]:g}, the layout has {layout.alpha:g}, so its update "
                    "would come out too strong or too weak. Load it with rescale=True, or use a layout with that alpha"
                )
            B_OR = B_OR.float() * (alphas[name] / layout.alpha)
        joined[name] = (A_RI.float()[None], B_OR.float()[None])
    vector_N = layout.join(joined)[0]
    _check_finite(vector_N, str(source))
    return vector_N


def read_layout(path: str | os.PathLike[str]) -> LoRALayout:
    """The layout that a `vector` file carries. Raises `ValueError` if it carries none."""
    source = _find(Path(path))
    return _layout_in(_read(source)[1], source)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a LoRA file says beside the tensors. Raises `ValueError` if there is no such file."""
    return _read(_find(Path(path)))[1]


def from_weights2weights(row_N: Tensor, layout: LoRALayout, *, rescale: bool = False) -> Tensor:
    """Vector (N,), float32, of one row of weights2weights' corpus (arXiv:2406.09413): our order, alpha 27.

    A layout with another alpha is refused, unless `rescale=True` (see `load`). Raises `ValueError` on a wrong shape.
    """
    return _from_alpha_to_alpha(_as_vector(row_N, layout).float(), layout, W2W_ALPHA, layout.alpha, rescale)


def to_weights2weights(vector_N: Vector, layout: LoRALayout, *, rescale: bool = False) -> Tensor:
    """Row (N,), float32, for weights2weights' code, which takes alpha = 27: the inverse of `from_weights2weights`."""
    return _from_alpha_to_alpha(_as_vector(vector_N, layout).float(), layout, layout.alpha, W2W_ALPHA, rescale)


def _from_alpha_to_alpha(vector_N: Tensor, layout: LoRALayout, alpha: float, new_alpha: float, rescale: bool) -> Tensor:
    """The vector that does under `new_alpha` what `vector_N` does under `alpha`: its B times alpha / new_alpha."""
    if alpha == new_alpha:
        return vector_N
    if not rescale:
        raise ValueError(
            f"weights2weights' LoRAs have alpha {W2W_ALPHA:g}, the layout has {layout.alpha:g}: pass rescale=True to "
            f"fold the difference into B, or use a layout with alpha={W2W_ALPHA:g}"
        )
    return torch.where(layout.mask_B(), vector_N * (alpha / new_alpha), vector_N)


def _encode(
    vector_N: Vector, layout: LoRALayout, format: str, dtype: torch.dtype, extra: Mapping[str, str] | None
) -> dict[str, bytes]:
    """File name -> content."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    vector_N = _as_vector(vector_N, layout).to(dtype).contiguous()
    _check_finite(vector_N, f"the vector as {dtype}")
    form, others = _form(layout, format, dtype, tuple((extra or {}).items()))
    data = vector_N.view(torch.uint8).numpy().data
    content = b"".join([data[part] if isinstance(part, slice) else part for part in form])
    return {_FILE_NAMES[format]: content, **others}


@functools.lru_cache(maxsize=64)
def _form(
    layout: LoRALayout, format: str, dtype: torch.dtype, extra: tuple[tuple[str, str], ...]
) -> tuple[list[bytes | slice], dict[str, bytes]]:
    """What is the same for all vectors: header and alphas, and between them which bytes of the vector; and other files.

    An endpoint writes a file for each request, and hundreds of tensors take several times as long as their bytes.
    """
    vector_N, config = torch.zeros(layout.size, dtype=dtype), None
    if format == "vector":
        tensors, metadata = {"vector": vector_N}, {"layout": json.dumps(layout.to_dict(), separators=(",", ":"))}
    else:
        tensors, metadata, config = foreign.encode(_split(vector_N, layout), layout, format)
    metadata |= {"format": "pt", "format_version": FORMAT_VERSION, "layout_id": layout.layout_id}
    if clash := sorted(set(metadata) & set(dict(extra))):
        raise ValueError(f"metadata keys {clash} are taken by the format; choose other names")
    header, in_order = _header(tensors, {**metadata, **dict(extra)})
    form: list[bytes | slice] = [header]
    for tensor in in_order:
        begin = tensor.data_ptr() - vector_N.data_ptr()
        inside = tensor.is_contiguous() and 0 <= begin < vector_N.nbytes
        form.append(slice(begin, begin + tensor.nbytes) if inside else _bytes(tensor))
    return form, {} if config is None else {foreign.PEFT_CONFIG: config.encode()}


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file as the library writes it, with its metadata in a fixed order (the library's changes from call to call)."""
    header, in_order = _header(tensors, metadata)
    return b"".join([header, *map(_bytes, in_order)])


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """All before the data, and the tensors in the order of the data: larger dtypes first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    in_order, offset = [], 0
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        tensor = tensors[key]
        in_order.append(tensor)
        begin, offset = offset, offset + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, in_order


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all: nobody meets half a file."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _find(path: Path) -> Path:
    """The safetensors file that `path` means."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a .safetensors file or a folder that holds one")
    known = [path / name for name in _FILE_NAMES.values() if (path / name).is_file()]
    found = known or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = sorted(file.name for file in (found or path.iterdir()))[:8]
        raise ValueError(f"{path} should hold one LoRA as .safetensors, it holds {names}; name the file itself")
    return found[0]


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(source, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{source} is not a safetensors file ({error}). Pickles (.bin, .pt, .ckpt) are never loaded, since loading "
            "one runs its code: convert a file that you trust with safetensors.torch.save_file"
        ) from error


def _layout_in(metadata: Mapping[str, str], source: Path) -> LoRALayout:
    if metadata.get("format_version") != FORMAT_VERSION or "layout" not in metadata:
        raise ValueError(
            f"{source} has format version {metadata.get('format_version')} and {'a' if 'layout' in metadata else 'no'} "
            f"layout in its header; expected a file saved with format='vector', version {FORMAT_VERSION}"
        )
    return LoRALayout.from_dict(json.loads(metadata["layout"]))


def _split(vector_N: Tensor, layout: LoRALayout) -> foreign.Matrices:
    return {name: (A_1RI[0], B_1OR[0]) for name, (A_1RI, B_1OR) in layout.split(vector_N[None]).items()}


def _as_vector(vector_N: Vector, layout: LoRALayout) -> Tensor:
    tensor = torch.as_tensor(vector_N).detach().cpu()
    if tuple(tensor.shape) != (layout.size,) or not tensor.is_floating_point():
        raise ValueError(
            f"the vector is {tensor.dtype} of shape {tuple(tensor.shape)}; layout {layout.layout_id} expects floats of "
            f"shape ({layout.size},): one LoRA, one row of the corpus"
        )
    return tensor


def _check_finite(vector_N: Tensor, what: str) -> None:
    if bad := int((~torch.isfinite(vector_N)).sum()):
        raise ValueError(f"{what} has {bad} NaN or infinite values: a diverged LoRA, or one too large for the dtype")
