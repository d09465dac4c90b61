"""`corpus.json`: what a corpus was made with. Only a run with the same recipe may add to it.

The recipe is all that decides the bits of a row: base model, layout, fine-tuning, photos, recogniser, groups. The rest
of the configuration (where photos lie, how many workers) may change between runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lora_diffusion
from lora_diffusion.artifacts import checksum
from lora_diffusion.artifacts.identity import Identity, ModelId
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store

FORMAT = "lora-diffusion-corpus"
FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 had no photo_embeddings
FILE = "corpus.json"
COUNTED = ("num_shards", "num_people", "num_failed")
GROUPS = ("people_per_group", "groups_per_shard")
_PACKAGES = ("torch", "diffusers", "transformers", "insightface", "onnxruntime", "numpy", "pyarrow", "pillow")


@dataclass(frozen=True)
class Manifest:
    """`layout` is `LoRALayout.to_dict()`; `base` and `recogniser` hold name and fingerprint; `counts` are filled in at the end."""

    layout: Mapping[str, Any]
    base: Mapping[str, str]
    recipe: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    state: str = "building"  # complete: every planned person is in shards or in failures
    counts: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    recogniser: Mapping[str, str] = field(default_factory=dict)  # empty: of an earlier release
    consent: bool = False  # whether shards have the column; False: of an earlier release

    @property
    def identity(self) -> Identity:
        """What these LoRAs belong to. Earlier releases wrote the recogniser down in configuration and recipe only."""
        embedder, config = self.recipe.get("embedder", {}), self.config.get("embedder", {})
        old = {"name": config.get("model"), "fingerprint": embedder.get("fingerprint")}
        recogniser = ModelId.of(self.recogniser or old)
        return Identity(ModelId.of(self.base), recogniser, self.layout_id, self.recipe.get("start", ""), self.recipe_id)

    @property
    def layout_id(self) -> str:
        return str(self.layout["layout_id"])

    @property
    def vector_size(self) -> int:
        return int(self.layout["size"])

    @property
    def recipe_id(self) -> str:
        """16 hex digits over everything that decides the bits of a row."""
        content = {"layout_id": self.layout_id, "base": self.base["fingerprint"], "recipe": self.recipe}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        ids = {"format": FORMAT, "format_version": self.format_version, "layout_id": self.layout_id}
        return checksum.seal_json({**ids, "recipe_id": self.recipe_id, **asdict(self)})

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Inverse of `to_dict`. Raises ValueError for another format or version, or fields that are missing or no objects."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = f"format {values.get('format')!r}" if isinstance(values, dict) else f"a {type(values).__name__}"
            raise ValueError(f"not a corpus: its {FILE} holds {found}, expected an object with format {FORMAT!r}")
        if values.get("format_version") not in READABLE:
            raise ValueError(
                f"the corpus has format version {values.get('format_version')}, this release reads {READABLE}: "
                "install the release of lora_diffusion that wrote it"
            )
        objects = ("layout", "base", "recipe", "config", "versions", "counts")
        if bad := [name for name in objects if not isinstance(values.get(name), dict)]:
            raise ValueError(f"{FILE} was edited or cut: {', '.join(bad)} missing or no object. Restore it from a copy")
        manifest = cls(
            **{name: values[name] for name in objects},
            state=str(values.get("state")),
            format_version=values["format_version"],
            recogniser=values.get("recogniser") or {},
            consent=values.get("consent") is True,
        )
        LoRALayout.from_dict(manifest.layout)
        if bad := [name for name in COUNTED if type(manifest.counts.get(name, 0)) is not int]:
            raise ValueError(f"{FILE} was edited or cut: its {bad[0]} is no number. Restore it from a copy")
        groups = manifest.recipe.get("groups")
        if not isinstance(groups, dict) or not all(type(groups.get(name)) is int for name in GROUPS):
            raise ValueError(f"{FILE} was edited or cut: its recipe names no groups. Restore it from a copy")
        if not isinstance(manifest.base.get("fingerprint"), str):
            raise ValueError(f"{FILE} was edited or cut: its base has no fingerprint. Restore it from a copy")
        return manifest

    @classmethod
    def read(cls, store: Store) -> Manifest:
        """Of the corpus in `store`. Raises FileNotFoundError if there is none, ValueError if it cannot be understood."""
        values = store.read_json(FILE)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{store.uri}/{FILE}: {error}") from error

    @classmethod
    def find(cls, store: Store) -> Manifest | None:
        """As `read`; None if there is no corpus."""
        try:
            return cls.read(store)
        except FileNotFoundError:
            return None

    def differences(self, other: Manifest) -> list[str]:
        """What of format or recipe differs, one line each: `finetune.steps: 80 there, 100 now` (there: self)."""
        return _differences(
            *(
                {
                    "format_version": manifest.format_version,
                    "base.fingerprint": manifest.base["fingerprint"],
                    "layout_id": manifest.layout_id,
                    **_flat(manifest.recipe),
                }
                for manifest in (self, other)
            )
        )

    def recipe_differences(self, other: Manifest) -> list[str]:
        """Likewise, of how a person's photos became a LoRA: not which photos, how many workers shared them, or scores."""
        sections = [{key: m.recipe.get(key) for key in ("dtype", "class_images", "finetune")} for m in (self, other)]
        photos = [{key: m.recipe.get("photos", {}).get(key) for key in ("crop", "face_margin")} for m in (self, other)]
        return _differences(*(_flat({**rest, "photos": some}) for rest, some in zip(sections, photos, strict=True)))


def versions() -> dict[str, str]:
    """Python's, this package's and the numerical packages' versions."""
    found = {"python": platform.python_version(), "lora_diffusion": lora_diffusion.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return [f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
