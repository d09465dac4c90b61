"""LoRA files of other programs: their tensors as the layers of a layout, and a layout's vector as their tensors.

                A                                       B                                      alpha
    peft        base_model.model.<m>.lora_A.weight      base_model.model.<m>.lora_B.weight     adapter_config.json
    diffusers   unet.<m>.lora_A.weight                  unet.<m>.lora_B.weight                 safetensors metadata
    kohya       lora_unet_<m_>.lora_down.weight         lora_unet_<m_>.lora_up.weight          lora_unet_<m_>.alpha

<m> is the module's name in the UNet, <m_> the same with "_" for "."; of SDXL it is the name in Stability's code, as kohya's
trainer for it writes them (input_blocks_4_1_...). What else is read: `dialects.py`. Everybody computes
W x + alpha / rank * B (A x). Where a file says nothing of alpha, everybody takes alpha = rank.

Axes: R rank, I / O features in / out.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.lora import dialects, headers
from lora_diffusion.lora.container import Part, bytes_of, json_object, members
from lora_diffusion.lora.layout import LoRAEntry, LoRALayout

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"


@lru_cache(maxsize=64)
def encoding(layout: LoRALayout, format: str, dtype: torch.dtype) -> tuple[str, memoryview, dict[str, str], str | None]:
    """All of a file that is the same for all vectors: `members` of its header, the data before the vector's own, metadata,
    and for peft the text of `adapter_config.json`. The vector's bytes follow as they are: A and B of each layer in turn."""
    if format == "vector":
        layout_json = json.dumps(layout.to_dict(), separators=(",", ":"))
        return members([("vector", dtype, (layout.size,))]), memoryview(b""), {"layout": layout_json}, None
    parts: list[Part] = []
    alphas = torch.full((len(layout.entries),), layout.alpha, dtype=torch.float32)
    kohya = _kohya_names(layout)
    if format == "kohya":
        parts += [(f"{kohya[entry.name]}.alpha", torch.float32, ()) for entry in layout.entries]
    for entry in layout.entries:
        stem, (A, B) = {
            "kohya": (kohya[entry.name], ("lora_down", "lora_up")),
            "peft": (f"base_model.model.{entry.name}", ("lora_A", "lora_B")),
            "diffusers": (f"unet.{entry.name}", ("lora_A", "lora_B")),
        }[format]
        A_shape, B_shape = _file_shapes(entry, layout)
        parts += [(f"{stem}.{A}.weight", dtype, A_shape), (f"{stem}.{B}.weight", dtype, B_shape)]
    before = bytes_of(alphas) if format == "kohya" else memoryview(b"")
    config = {"r": layout.rank, "lora_alpha": layout.alpha, "target_modules": [entry.name for entry in layout.entries]}
    if format == "peft":
        return members(parts), before, {}, json.dumps({"peft_type": "LORA", **config}, indent=2)
    if format == "diffusers":  # Passed on to peft's LoraConfig, so it may hold nothing that peft does not know.
        return members(parts), before, {DIFFUSERS_CONFIG: json.dumps({f"unet.{k}": v for k, v in config.items()})}, None
    network = {"ss_network_dim": str(layout.rank), "ss_network_alpha": str(layout.alpha), "ss_network_args": "{}"}
    return members(parts), before, {"ss_network_module": "networks.lora", **network}, None


def _file_shapes(entry: LoRAEntry, layout: LoRALayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in files: a convolution's A is a filter (R, channels, height, width), its B one of 1 x 1."""
    inputs, (outputs, *ones) = entry.weight_shapes
    return (layout.rank, *inputs), (outputs, layout.rank, *ones)


def _kohya_names(layout: LoRALayout) -> dict[str, str]:
    names = {entry.name: entry.name for entry in layout.entries}
    if headers.family(layout) == "sdxl":
        per_block = dialects.layers_per_block(names)
        # of two names of an upsampler the last is that of blocks with attention, as all of SDXL's are that have one
        names = {name: [name, *dialects.stability_names(name, per_block)][-1] for name in names}
    return {name: "lora_unet_" + spelled.replace(".", "_") for name, spelled in names.items()}


@dataclass(frozen=True)
class Layer:
    """A (R, I) and B (O, R) of one layer as a file has them, with a rank of their own; the update is `scale` B A.

    `precision`: of the scale; an alpha in half precision was rounded.
    """

    A_RI: Tensor
    B_OR: Tensor
    scale: float
    precision: float = 0.0

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]


@dataclass(frozen=True)
class Decoded:
    """`extra`: what the file holds beside the layout's layers, in words; `assumed`: peft's file without alpha."""

    layers: dict[str, Layer]
    missing: list[str]
    extra: list[str]
    assumed: bool


def decode(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    layout: LoRALayout,
    source: str,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
) -> Decoded:
    """The layers of `layout` that the file `source` describes, whatever its dialect.

    config: peft's `adapter_config.json`, if one lies beside the file. alpha: for layers of which the file says none.

    Raises:
        ValueError: no LoRA, one of another model, a variant that a vector of A and B cannot hold, broken pairs.
    """
    names = dialects.spellings(tuple(entry.name for entry in layout.entries))
    keys = {key: dialects.read_key(key) for key in tensors}
    found: dict[str, dict[str, Tensor]] = {}
    extra = []
    for key, read in keys.items():
        name = names.get(read.layer) if read else None
        if read is None or name is None:
            extra.append(key)
        elif read.kind:
            raise ValueError(_of_kind(source, read.kind))
        elif read.side in found.setdefault(name, {}):
            raise ValueError(f"{source} has two tensors for {read.side} of {name}: a damaged file, or two LoRAs in one")
        else:
            found[name][read.side] = tensors[key]
    if not any("A" in sides or "B" in sides for sides in found.values()):
        raise ValueError(_nothing_of_ours(tensors, keys, layout, source))
    _check_shapes(found, tensors, layout, source)
    config = config or _config_in(metadata, source)
    scales = _Scales(alpha, {}, False) if config is None else _Scales.of_config(config, source)
    layers = {name: scales.layer(name, sides) for name, sides in found.items()}
    missing = [entry.name for entry in layout.entries if entry.name not in layers]
    assumed = config is None and alpha is None and any(key.startswith("base_model.model.") for key in tensors)
    return Decoded(layers, missing, _described(extra, keys) if extra else [], assumed)


@dataclass(frozen=True)
class _Scales:
    """alpha / rank of each layer: by its own alpha, or a config's (with patterns, and rank-stabilised LoRA), or rank / rank."""

    alpha: float | None
    patterns: Mapping[str, float]
    stabilised: bool

    @classmethod
    def of_config(cls, config: Mapping[str, Any], source: str) -> "_Scales":
        """Of peft's LoraConfig. Raises ValueError for another kind than plain LoRA, or an alpha that is no number."""
        kind = next((key for key in ("use_dora", "lora_bias") if config.get(key)), config.get("peft_type") or "LORA")
        if kind != "LORA":
            kinds = {"use_dora": "DoRA", "lora_bias": "LoRA with biases"}
            raise ValueError(_of_kind(source, kinds.get(str(kind), str(kind))))
        patterns = config.get("alpha_pattern") or {}
        alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, Mapping) else [str(patterns)])]
        if bad := [alpha for alpha in alphas if not _is_number(alpha)]:
            raise ValueError(f"the config of {source} has lora_alpha {bad[0]!r}; expected a number")
        return cls(alphas[0], patterns, bool(config.get("use_rslora")))

    def layer(self, name: str, sides: Mapping[str, Tensor]) -> Layer:
        A, B = sides["A"].flatten(1).float(), sides["B"].flatten(1).float()
        own = sides.get("alpha")
        if own is not None:
            return Layer(A, B, float(own) / len(A), torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0)
        by_pattern = (alpha for part, alpha in self.patterns.items() if name == part or name.endswith(f".{part}"))
        alpha = next(by_pattern, self.alpha)
        return Layer(A, B, 1.0 if alpha is None else alpha / (math.sqrt(len(A)) if self.stabilised else len(A)))


def _config_in(metadata: Mapping[str, str], source: str) -> dict[str, Any] | None:
    """What diffusers writes into the header about the UNet's LoRA."""
    if DIFFUSERS_CONFIG not in metadata:
        return None
    config = json_object(metadata[DIFFUSERS_CONFIG], f"{DIFFUSERS_CONFIG} of {source}")
    ours = {key.removeprefix("unet."): value for key, value in config.items() if not key.startswith("text_encoder")}
    return ours or None


def _check_shapes(
    found: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
    layout: LoRALayout,
    source: str,
) -> None:
    """A 1 x 1 convolution may be a matrix and a linear layer have ones at the end: what counts are the numbers."""
    wrong = []
    for entry in layout.entries:
        sides = found.get(entry.name)
        if sides is None:
            continue
        if lost := {"A", "B"} - sides.keys():
            raise ValueError(f"{source} has no {lost.pop()} for {entry.name}: the file was cut. Copy or make it again")
        A, B = sides["A"], sides["B"]
        inputs, outputs = entry.weight_shapes
        fits = _is_matrix(A, inputs, 1) and _is_matrix(B, outputs, 0) and A.shape[0] == B.shape[1] > 0
        if not fits or not (A.is_floating_point() and B.is_floating_point()):
            wrong.append(f"{entry.name} has A {_shape(A)} and B {_shape(B)}, expected (rank, {entry.in_features}) and "
                         f"({entry.out_features}, rank)")  # fmt: skip
        if not _is_number(sides.get("alpha", torch.ones(()))):
            wrong.append(f"{entry.name} has an alpha that is not one finite number")
    if wrong:
        reason = _another_model(tensors, layout, source)
        raise ValueError(
            reason or f"{source} does not fit layout {layout.layout_id}: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        )


def _is_matrix(tensor: Tensor, features: tuple[int, ...], first: int) -> bool:
    """Whether the axes beside the rank's, which is axis 0 of A (`first` 1) and 1 of B (`first` 0), are `features`."""
    shape = list(tensor.shape)
    if len(shape) < 2:
        return False
    rest = shape[1:] if first else [shape[0], *shape[2:]]
    same = [n for n in rest if n != 1] == [n for n in features if n != 1]
    return same or rest == [math.prod(features)]


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value.float()).all())
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _of_kind(source: str, kind: str) -> str:
    return (
        f"{source} is of the kind {kind}; a vector holds plain LoRA, B A. Merge it into the model and extract a LoRA with the "
        "tool that made it, or train a plain one"
    )


def family_of(tensors: Mapping[str, Tensor]) -> str:
    """As `dialects.family`, of a file."""
    keys = {key: dialects.read_key(key) for key in tensors}
    widths = {read.layer: math.prod(tensors[key].shape[1:]) for key, read in keys.items() if read and read.side == "A"}
    return dialects.family(widths, tensors)


def _another_model(tensors: Mapping[str, Tensor], layout: LoRALayout, source: str) -> str:
    """The message about a LoRA of another family than the layout's; "" if the names and shapes tell of none."""
    own = {entry.name.replace(".", "_"): entry.in_features for entry in layout.entries}
    theirs, ours = family_of(tensors), dialects.family(own)
    if not theirs or theirs == ours:
        return ""
    return (
        f"{source} is a LoRA for {dialects.FAMILIES.get(theirs, theirs)}; layout {layout.layout_id} is one of "
        f"{dialects.FAMILIES.get(ours, 'another UNet')}. Load it with the layout of the model that it was made for"
    )


def _nothing_of_ours(
    tensors: Mapping[str, Tensor], keys: Mapping[str, dialects.Key | None], layout: LoRALayout, source: str
) -> str:
    kinds = Counter(read.kind for read in keys.values() if read and read.kind)
    if reason := _another_model(tensors, layout, source):
        return reason
    if kinds:
        return _of_kind(source, kinds.most_common(1)[0][0])
    listed = ", ".join(repr(key) for key in list(tensors)[:3]) or "none at all"
    if not any(keys.values()):
        other = dialects.what_else(tensors)
        return f"{source} holds no LoRA{f': it is {other}' if other else ''}. Its tensors: {listed}"
    return (
        f"{source} describes no layer of layout {layout.layout_id} (target_modules {layout.target_modules}), but: "
        f"{'; '.join(_described(tensors, keys))}. Build the layout from the UNet that it was made for"
    )


def _described(extra: Iterable[str], keys: Mapping[str, dialects.Key | None]) -> list[str]:
    """In words and numbers, what the keys that the layout does not know belong to."""
    groups: dict[str, list[str]] = {}
    for key in extra:
        groups.setdefault(dialects.group_of(key), []).append(key)
    described = []
    for group, keys_of in groups.items():
        layers = {read.layer for key in keys_of if (read := keys[key])}
        kinds = sorted({re.sub(r".*?(?:_\d+)+_", "", layer) for layer in layers})[:6]
        if layers and group != "unknown":
            described.append(f"{len(layers)} layers of the {group} ({', '.join(kinds)})")
        else:
            described.append(f"{len(keys_of)} unknown tensors ({', '.join(map(repr, keys_of[:3]))})")
    return described
