"""A LoRA vector as a file that other programs load, and back, bit for bit.

| format    | what is written                                            | who loads it                                             |
|-----------|------------------------------------------------------------|----------------------------------------------------------|
| kohya     | one `.safetensors`, `lora_unet_*` keys with alpha          | ComfyUI, A1111, Forge, InvokeAI, `pipe.load_lora_weights` |
| diffusers | `pytorch_lora_weights.safetensors`                         | `pipe.load_lora_weights`, diffusers 0.34+ only           |
| peft      | folder: `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(unet, folder)` only           |
| vector    | one `.safetensors`, the flat vector and its layout         | this package                                             |

The default is kohya, the only one that all image programs read exactly. What `load` reads: any of these and the files of
other trainers (`dialects.py`). Rows of weights2weights' corpus are plain tensors: `weights2weights.py`.
Only safetensors and JSON are read, never a pickle. `docs/reference/formats.md` has the contents.

Axes: N vector length, R rank, I / O features in / out.
"""

import io
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_diffusion.lora import container, foreign, headers, ranks
from lora_diffusion.lora.container import serialise
from lora_diffusion.lora.files import FILE_NAMES, PathLike, open_file
from lora_diffusion.lora.layout import LayerShape, LoRALayout, Vector, shape_of
from lora_diffusion.lora.weights2weights import from_weights2weights, to_weights2weights
from lora_diffusion.places import place
from lora_diffusion.storage import open_store

__all__ = ["FORMATS", "Format", "Loaded", "family_of", "from_weights2weights", "layout_of", "load", "portable_metadata", "read", "read_layout",
           "read_metadata", "save", "serialise", "to_bytes", "to_weights2weights"]  # fmt: skip

Format = Literal["diffusers", "peft", "kohya", "vector"]
FORMATS: tuple[str, ...] = get_args(Format)
FORMAT_VERSION = "1"


def save(
    vector_N: Vector,
    layout: LoRALayout,
    path: PathLike,
    format: Format = "kohya",
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] | None = None,
) -> Path | str:
    """Write one vector (N,) and return what to give to the loader: the file, or for peft the folder.

    A path (local, or s3://) that ends in `.safetensors` is the file; any other is a folder, made if need be. `metadata` goes
    into the file's header, as text. `identity`, `base_model`, `licence`, `date` and `trigger` (what a prompt has to say;
    default: sks person) are also written where user interfaces look for them. `dtype=torch.float16` halves the file, at the
    price of exactness. Returns a `Path`, or the address in a bucket as text.

    Raises:
        ValueError: wrong shape or format, values that are not finite, a peft path that is not a folder, another suffix,
            metadata that cannot be text.
        StoreError: it cannot be written there.
    """
    where = place(path)
    is_file = PurePath(where).suffix.lower() == ".safetensors" and not _means_folder(path, where)
    if is_file and format == "peft":
        raise ValueError(f"{path}: peft wants a folder for its two files; give a path without .safetensors")
    if (
        not is_file
        and re.fullmatch(r"\.[A-Za-z]{2,}[0-9]?", suffix := PurePath(where).suffix)
        and not _means_folder(path, where)
    ):
        raise ValueError(
            f"{path}: a LoRA is written as .safetensors, not as {suffix}. Give a name that ends in .safetensors, or a folder: "
            "one that exists, or its name with / at the end"
        )
    files = _encode(vector_N, layout, format, dtype, metadata, PurePath(where).stem if is_file else "")
    folder, _, name = where.rpartition("/") if is_file else (where, "", "")
    store = open_store(folder or "/")
    if is_file:
        files = {name: files[FILE_NAMES[format]]}
    for file, data in files.items():
        store.write(file, data)
    written = where if is_file or format == "peft" else f"{where.rstrip('/')}/{FILE_NAMES[format]}"
    return Path(written) if store.local else written


def to_bytes(
    vector_N: Vector,
    layout: LoRALayout,
    format: Format = "kohya",
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """What `save` would write, in memory: a safetensors file, or for peft a zip of the folder's two files.

    Equal arguments give equal bytes on one day; with a `date` in `metadata`, for ever. Raises `ValueError` as `save` does.
    """
    files = _encode(vector_N, layout, format, dtype, metadata, "")
    if format != "peft":
        return files[FILE_NAMES[format]]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # A bare ZipInfo carries a fixed date, not today's.
    return buffer.getvalue()


@dataclass(frozen=True)
class Loaded:
    """A vector (N,), float32, and what is to know about it.

    missing: layers of the layout that the file does not describe; they are zero. ignored: what else the file holds, in
    words. energy: share of the update's squared norm that an SVD to the layout's rank kept; 1 without one.
    assumed: the file is peft's, and neither it nor a config beside it says alpha, so alpha = rank was taken.
    """

    vector_N: Tensor
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    energy: float = 1.0
    assumed: bool = False

    @property
    def notes(self) -> list[str]:
        """What was left out, in sentences."""
        found = (
            [f"{len(self.missing)} layers are not in the file and do nothing: {_some(self.missing)}"]
            if self.missing
            else []
        )
        found += [f"left out, as the layout has no place for it: {'; '.join(self.ignored)}"] if self.ignored else []
        found += [f"{self.energy:.1%} of the update's energy was kept by the SVD"] if self.energy < 1 else []
        assumed = f"neither the file nor an {foreign.PEFT_CONFIG} beside it says alpha: taken as the rank; if not, pass alpha="
        return [*found, *([assumed] if self.assumed else [])]


def load(
    path: PathLike,
    layout: LoRALayout | None = None,
    *,
    partial: bool = False,
    ignore_extra: bool = False,
    svd: bool = False,
    alpha: float | None = None,
) -> Tensor:
    """The vector (N,), float32, of a file or folder, whatever program wrote it; its keys tell which.

    `layout` may be left out for our own `vector` files, which carry theirs. The update stays what it is in the file: an alpha
    of its own is folded into B, a lower rank is padded with zeros. What would change it has to be asked for, and warns:

    partial: layers that the file does not describe are zero. ignore_extra: what it describes beyond the layout (text encoder,
    other layers) is left out. svd: a higher rank is cut to the layout's. alpha: of a file that says none (default: its rank).

    Raises:
        ValueError: no LoRA there, one of another base model, or of a kind that a vector cannot hold; layers that are missing,
            too many or of another shape; values that are not finite; a damaged file.
        StoreError: it cannot be read.
    """
    loaded = read(path, layout, partial=partial, ignore_extra=ignore_extra, svd=svd, alpha=alpha)
    for note in loaded.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return loaded.vector_N


def read(
    path: PathLike,
    layout: LoRALayout | None = None,
    *,
    partial: bool = False,
    ignore_extra: bool = False,
    svd: bool = False,
    alpha: float | None = None,
) -> Loaded:
    """As `load`, with what there is to know about the vector instead of warnings."""
    source, tensors, metadata, config = open_file(path)
    if set(tensors) == {"vector"}:
        own = _layout_in(metadata, source)
        layout = layout or own
        names = {entry.name for entry in layout.entries}
        pairs = own.split(own.as_vector(tensors["vector"]).float()[None])
        layers = {name: foreign.Layer(A[0], B[0], own.scale) for name, (A, B) in pairs.items() if name in names}
        extra = [name for name in pairs if name not in names]
        shapes = {entry.name: (entry.in_features, entry.out_features) for entry in own.entries}
        if not layers or any(shapes.get(e.name, s := (e.in_features, e.out_features)) != s for e in layout.entries):
            raise ValueError(
                f"{source} was made for layout {own.layout_id} (rank {own.rank}, N {own.size}), a UNet with other layers than "
                f"layout {layout.layout_id} (rank {layout.rank}, N {layout.size}). Use read_layout(path)"
            )
        missing = [entry.name for entry in layout.entries if entry.name not in layers]
        decoded = foreign.Decoded(layers, missing, [f"{len(extra)} layers ({_some(extra)})"] if extra else [], False)
    elif layout is None:
        raise ValueError(f"{source} holds no layout; pass the one of your UNet: load(path, layout)")
    else:
        decoded = foreign.decode(tensors, metadata, layout, source, config, alpha)
    if decoded.missing and not partial:
        raise ValueError(
            f"{source} does not describe {len(decoded.missing)} of the {len(layout.entries)} layers of layout "
            f"{layout.layout_id}: missing {_some(decoded.missing)}. Load it with partial=True to leave them zero, or with a "
            "layout whose target_modules are the file's"
        )
    if decoded.extra and not ignore_extra:
        raise ValueError(
            f"{source} holds more than layout {layout.layout_id} (target_modules {_some(layout.target_modules)}): "
            f"{'; '.join(decoded.extra)}. Load it with ignore_extra=True to leave that out, or with a layout that has it"
        )
    return _fitted(decoded, layout, source, svd)


def _fitted(decoded: foreign.Decoded, layout: LoRALayout, source: str, svd: bool) -> Loaded:
    """The vector of what was decoded, with ranks and scales of the layout."""
    wholes, matrices = [], {}
    for entry in layout.entries:
        layer = decoded.layers.get(entry.name)
        if layer is None:
            matrices[entry.name] = (
                torch.zeros(1, layout.rank, entry.in_features),
                torch.zeros(1, entry.out_features, layout.rank),
            )
            continue
        _check_finite(layer.A_RI, f"{entry.name} of {source}")
        _check_finite(layer.B_OR, f"{entry.name} of {source}")
        try:
            A_RI, B_OR = ranks.fit(layer, layout.rank, layout.scale)
        except RuntimeError as error:  # of the SVD
            raise ValueError(
                f"{entry.name} of {source} holds values too large to be cut to rank {layout.rank}"
            ) from error
        wholes.append((layer, A_RI, B_OR))
        matrices[entry.name] = A_RI[None], B_OR[None]
    vector_N = layout.join(matrices)[0]
    _check_finite(vector_N, source)
    share, highest = 1.0, max(layer.rank for layer in decoded.layers.values())
    if highest > layout.rank:
        whole = sum(ranks.energy(layer.A_RI, layer.B_OR) * (layer.scale / layout.scale) ** 2 for layer, _, _ in wholes)
        share = min(1.0, sum(ranks.energy(A, B) for _, A, B in wholes) / whole) if whole else 1.0
        if not svd:
            raise ValueError(
                f"{source} has rank {highest}, layout {layout.layout_id} has {layout.rank}: load it with svd=True, which keeps "
                f"{share:.1%} of the update's energy, or use a layout of rank {highest}"
            )
    return Loaded(vector_N, tuple(decoded.missing), tuple(decoded.extra), share, decoded.assumed)


def layout_of(path: PathLike, unet: nn.Module) -> LoRALayout:
    """The layout on `unet` (which may lie on the meta device) that holds all of a file's layers: its highest rank, and the alpha
    of most of its layers. Raises `ValueError` as `load`, except about layers of other parts of the model."""
    source, tensors, metadata, config = open_file(path)
    if set(tensors) == {"vector"}:
        return _layout_in(metadata, source)
    shapes: dict[str, LayerShape] = {
        name: shape for name, module in unet.named_modules() if (shape := shape_of(module))
    }
    whole = LoRALayout.from_shapes(shapes, rank=1, alpha=1.0, target_modules=tuple(shapes))
    layers = foreign.decode(tensors, metadata, whole, source, config).layers
    rank = max(layer.rank for layer in layers.values())
    alpha = Counter(abs(layer.scale) * layer.rank for layer in layers.values()).most_common(1)[0][0]
    shapes = {name: shapes[name] for name in layers}
    return LoRALayout.from_shapes(shapes, rank=rank, alpha=alpha or rank, target_modules=tuple(shapes))


def family_of(path: PathLike) -> str:
    """Which base model a file is for, by its layers: sd1, sd2, sdxl, refiner, the name of another, or "" if they do not tell."""
    return foreign.family_of(open_file(path)[1])


def read_layout(path: PathLike) -> LoRALayout:
    """The layout that a `vector` file carries. Raises `ValueError` if it carries none."""
    source, _, metadata, _ = open_file(path)
    return _layout_in(metadata, source)


def read_metadata(path: PathLike) -> dict[str, str]:
    """What the header of a LoRA file says beside the tensors. Raises `ValueError` if there is no such file."""
    return open_file(path)[2]


def portable_metadata(path: PathLike) -> dict[str, str]:
    """What a file's header says that is true of a copy in another format, too: not formats, ranks, checksums."""
    own = ("format", "format_version", "layout", "layout_id", foreign.DIFFUSERS_CONFIG, container.CHECKSUM)
    return {k: v for k, v in read_metadata(path).items() if k not in own and not k.startswith(("ss_network_", "sshs_"))}


def _encode(
    vector_N: Vector, layout: LoRALayout, format: str, dtype: torch.dtype, extra: Mapping[str, Any] | None, name: str
) -> dict[str, bytes]:
    """File name -> content. `name`: what the LoRA is called where `extra` has no identity; "" makes one of its content.

    The vector is the data of every format as it lies, since a layout's order is A and B of each layer in turn.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    vector_N = layout.as_vector(vector_N).to(dtype).contiguous()
    _check_finite(vector_N, f"the vector as {dtype}")
    given = container.text_values(extra or {})
    tensors, before, own, config = foreign.encoding(layout, format, dtype)
    data, metadata = container.bytes_of(vector_N), dict(own)
    metadata |= {"format": "pt", "format_version": FORMAT_VERSION, "layout_id": layout.layout_id}
    metadata[container.CHECKSUM] = container.checksum(before, data)
    if clash := sorted(metadata.keys() & given.keys()):
        raise ValueError(f"metadata keys {clash} are taken by the format; choose other names")
    if format != "vector":
        metadata = headers.for_programs(layout, given, name or f"lora-{metadata[container.CHECKSUM][2:10]}") | metadata
    content = container.file(tensors, metadata | given, before, data)
    return {FILE_NAMES[format]: content} | ({} if config is None else {foreign.PEFT_CONFIG: config.encode()})


def _means_folder(path: PathLike, where: str) -> bool:
    return os.fspath(path).endswith("/") or (not where.startswith("s3://") and os.path.isdir(where))


def _layout_in(metadata: Mapping[str, str], source: str) -> LoRALayout:
    if metadata.get("format_version") != FORMAT_VERSION or "layout" not in metadata:
        raise ValueError(
            f"{source} has format version {metadata.get('format_version')} and {'a' if 'layout' in metadata else 'no'} "
            f"layout in its header; expected a file saved with format='vector', version {FORMAT_VERSION}"
        )
    try:
        return LoRALayout.from_dict(container.json_object(metadata["layout"], "it"))
    except ValueError as error:
        raise ValueError(f"the layout in the header of {source}: {error}") from error


def _check_finite(vector_N: Tensor, what: str) -> None:
    if math.isfinite(vector_N.sum(dtype=torch.float32)):  # the quick way; large numbers may overflow there
        return
    if bad := int((~torch.isfinite(vector_N)).sum()):
        raise ValueError(f"{what} has {bad} NaN or infinite values: a diverged LoRA, or one too large for the dtype")


def _some(names: Any) -> str:
    listed = ", ".join(str(name) for name in list(names)[:3])
    return f"{listed}, ... ({len(names)} in all)" if len(names) > 3 else listed
