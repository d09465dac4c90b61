"""Which artifacts belong together: the base model, recogniser, layout, start and recipe behind a corpus or a synthesiser.

Carried from corpus to synthesiser to endpoint to LoRA file, and compared wherever two of them meet. Imports no torch: the
endpoint's first stage reads it, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_diffusion.storage import open_store

SHIPPED_SYNTHESIZERS = {"tiny": Path(__file__).resolve().parents[1] / "assets" / "synthesizer"}
OLD_DIGITS = 16
"""A fingerprint of so many digits was made by an earlier release, in another way: only the model itself can tell whether
it is its own."""
RENAMED = {"b486db5bb0ed5c8a64c0": "280ede7ac3e2bd50e780"}
"""Models of earlier releases whose artifacts fit one of today: `tiny-sd` before the decoder of its autoencoder was sharpened, of
which no LoRA knows."""

PARTS = ("base", "recogniser", "layout_id", "start")
"""What must be the same wherever LoRAs meet."""


class Mismatch(ValueError):
    """Two artifacts that do not belong together."""


@dataclass(frozen=True)
class ModelId:
    """name: what it was loaded by. fingerprint: what it is, wherever it lies; "" if nobody wrote it down."""

    name: str = ""
    fingerprint: str = ""

    @classmethod
    def of(cls, values: Any) -> ModelId:
        """Of a record; one that is no mapping raises ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a model's name and fingerprint were expected, not {str(values)[:100]!r}")
        fingerprint = str(values.get("fingerprint") or "")
        return cls(str(values.get("name") or ""), RENAMED.get(fingerprint, fingerprint))

    def __str__(self) -> str:
        return f"{self.name or 'without a name'} ({self.fingerprint or 'no fingerprint'})"

    def differs(self, other: ModelId) -> bool:
        """Whether two records name different models. Where their fingerprints cannot be compared (one is missing, or of an
        earlier release), names decide; with no name either, nothing is known to differ."""
        if self.fingerprint and other.fingerprint and _is_old(self.fingerprint) == _is_old(other.fingerprint):
            return self.fingerprint != other.fingerprint
        return bool(self.name and other.name) and _last(self.name) != _last(other.name)


class LoadedModel(Protocol):
    """A base model or a recogniser that is at hand: `knows` tells whether a fingerprint, of whatever release, is its own."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def knows(self, fingerprint: str) -> bool: ...


@dataclass(frozen=True)
class Identity:
    """base: draws the pictures. recogniser: makes the embeddings. layout_id: what a vector's numbers mean, None if unknown.

    start: fingerprint of the vector that every fine-tuning began with, "" for a random one, None if nobody wrote it down.
    recipe_id: of all that made the LoRAs, photos aside.
    """

    base: ModelId = field(default_factory=ModelId)
    recogniser: ModelId = field(default_factory=ModelId)
    layout_id: str | None = None
    start: str | None = None
    recipe_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Identity:
        """Inverse of `to_dict`; keys of a later release are left alone."""
        base, recogniser = ModelId.of(values.get("base") or {}), ModelId.of(values.get("recogniser") or {})
        return cls(base, recogniser, values.get("layout_id"), values.get("start"), values.get("recipe_id") or "")

    def metadata(self) -> dict[str, str]:
        """What the header of a LoRA file says of it, beside the `layout_id` that is there anyway. No folders of ours."""
        found = {
            "base_model": _public(self.base.name),
            "base_fingerprint": self.base.fingerprint,
            "recogniser": _public(self.recogniser.name),
            "recogniser_fingerprint": self.recogniser.fingerprint,
            "start": self.start or "",
            "recipe_id": self.recipe_id,
        }
        return {key: value for key, value in found.items() if value}

    def differences(self, other: Identity, parts: Collection[str] = PARTS) -> list[str]:
        """`recogniser: tiny (12ab) there, tiny-b (34cd) here` (there: self), one line for each part that does not fit."""
        lines = []
        for part in parts:
            there, here = getattr(self, part), getattr(other, part)
            if isinstance(there, ModelId):
                differs = there.differs(here)
            else:
                differs = there != here and None not in (there, here)
            if differs:
                lines.append(f"{part}: {there or 'random'} there, {here or 'random'} here")
        return lines

    def check_base(self, base: LoadedModel, owner: str) -> None:
        """Raises Mismatch unless `owner`, whose identity this is, was made with this base model."""
        if self.base.fingerprint and not base.knows(self.base.fingerprint):
            way_out = "Give that base model, or what was made for this one"
            raise _mismatch(owner, "base model", self.base, base, way_out)

    def check_recogniser(self, embedder: LoadedModel, owner: str) -> None:
        """Raises Mismatch unless `owner` was made with this recogniser: another one's embeddings mean nothing there, and what
        came out would be a stranger. An owner of an earlier release, without a fingerprint, is believed by the name."""
        wanted = self.recogniser
        way_out = "Leave the recogniser out to take that one, or give a folder of the same files"
        if wanted.fingerprint:
            same = embedder.knows(wanted.fingerprint)
        else:
            same = not wanted.differs(ModelId(embedder.name))
            way_out += f'. If these are the same files, write "fingerprint": "{embedder.fingerprint}" beside that name'
        if not same:
            raise _mismatch(owner, "recogniser", wanted, embedder, way_out)

    @property
    def base_name(self) -> str:
        """What to load the base model by. Raises ValueError if nobody wrote it down."""
        if not self.base.name:
            raise ValueError("nobody wrote down which base model this synthesiser was trained for: name it yourself")
        return self.base.name

    @property
    def recogniser_name(self) -> str:
        """What to load the recogniser by. Raises ValueError if nobody wrote it down."""
        if not self.recogniser.name:
            raise ValueError("nobody wrote down which recogniser this synthesiser was trained with: name it yourself")
        return self.recogniser.name

    def check(self, other: Identity, mine: str, theirs: str, way_out: str, parts: Collection[str] = PARTS) -> None:
        """Raises Mismatch if a part differs. `mine`, `theirs`: what the two are called."""
        if lines := self.differences(other, parts):
            raise Mismatch(f"{theirs} does not belong to {mine}: {'; '.join(lines)}. {way_out}")


def read_identity(synthesizer: str | Path) -> Identity:
    """Of a synthesiser's folder (also s3://) or a shipped one, without its weights. Raises ValueError if there is none."""
    try:
        config = open_store(SHIPPED_SYNTHESIZERS.get(str(synthesizer), synthesizer)).read_json("config.json")
        return provenance_identity(config["provenance"], config["layout_id"])
    except (FileNotFoundError, KeyError, TypeError, AttributeError) as error:
        raise no_synthesizer(synthesizer) from error


def no_synthesizer(place: str | Path) -> ValueError:
    return ValueError(
        f"there is no synthesiser at {place} (no config.json): give a folder that jobs/train.py or jobs/publish.py wrote, or the "
        f"name of a shipped one: {', '.join(SHIPPED_SYNTHESIZERS)}"
    )


def provenance_identity(provenance: Mapping[str, Any], layout_id: str) -> Identity:
    """Of the `provenance` that a synthesiser's config.json holds."""
    return Identity.from_dict({**provenance.get("corpus", {}), **provenance, "layout_id": layout_id})


def _mismatch(owner: str, kind: str, wanted: ModelId, found: LoadedModel, way_out: str) -> Mismatch:
    here = ModelId(found.name, found.fingerprint)
    return Mismatch(f"{owner} was made with the {kind} {wanted}, this {kind} is {here}. {way_out}")


def _is_old(fingerprint: str) -> bool:
    return len(fingerprint) <= OLD_DIGITS


def _last(name: str) -> str:
    """`buffalo_l` of s3://bucket/models/buffalo_l: the same files are called differently on different machines."""
    return name.rstrip("/").rpartition("/")[2]


def _public(name: str) -> str:
    """A hub id or a shipped name as it is; of a folder or bucket the last part, as LoRA files are given away."""
    return _last(name) if name.startswith(("/", ".", "~")) or "://" in name else name
