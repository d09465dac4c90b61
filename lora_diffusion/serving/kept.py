"""What a library keeps of one LoRA, the laws of putting and deleting, and the bytes that lie in a store outside of this process.

The bytes are safetensors with a checksum (`artifacts.checksum`): code and vector as tensors, all else as text in the header.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
from safetensors.numpy import load, save

from lora_diffusion.artifacts import checksum
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Code, LoRARecord

FORMAT, VERSION = "lora-diffusion-record", "1"
MAKERS = 1000  # of one LoRA; of more the first can't delete it any more
TOKEN_BYTES = 64


@dataclass(frozen=True)
class Kept:
    """record: None of one that is gone, and then `gone` says why. expires: time of the library's clock. tokens: of all who made it, hashed."""

    record: LoRARecord | None
    expires: float
    tokens: tuple[str, ...] = ()
    gone: str = ""

    @property
    def nbytes(self) -> int:
        return (self.record.nbytes if self.record else 0) + TOKEN_BYTES * len(self.tokens)

    def found(self, now: float) -> LoRARecord:
        """Raises ServingError "unknown_lora"."""
        if self.record is None or self.expires <= now:
            raise unknown(self.gone or EXPIRED)
        return replace(self.record, expires_in=self.expires - now)

    def without(self, token: str) -> Kept | None:
        """Once its maker with this token has deleted it; None where nobody else has made it. Raises ServingError "not_yours"."""
        mine = hashed(token)
        if self.tokens and mine not in self.tokens:
            raise not_yours()
        left = tuple(known for known in self.tokens if known != mine)
        return replace(self, tokens=left) if left else None


EXPIRED, DELETED, EVICTED = "has expired", "was deleted", "had to make room for newer ones"


def put_on(before: Kept | None, record: LoRARecord, token: str, expires: float, now: float) -> Kept:
    """What is kept when it is put once more: what is known of it already stays known, whoever made it may delete it."""
    tokens: tuple[str, ...] = ()
    if before is not None and before.record is not None and before.expires > now:
        record, tokens = record.completed(before.record), before.tokens
    if token:
        mine = hashed(token)
        tokens = (*(known for known in tokens if known != mine), mine)[-MAKERS:]
    return Kept(record, expires, tokens)


def hashed(token: str) -> str:
    """32 hex digits: who reads the store can delete nothing with them."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def unknown(why: str = "", lost: str = "") -> ServingError:
    """why: it is gone. lost: a sentence, where nobody knows whether it ever was here."""
    what = f"This LoRA {why}." if why else f"There is no LoRA with this id here. {lost}".rstrip()
    return ServingError("unknown_lora", f"{what} Make it again.")


def not_yours() -> ServingError:
    return ServingError(
        "not_yours", "This LoRA is deleted with the deletion_token that came when it was made: send X-Deletion-Token."
    )


def ago(seconds: float) -> str:
    """As in "12 minutes ago"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def to_bytes(kept: Kept) -> bytes:
    record = kept.record or LoRARecord()
    about = {"format": FORMAT, "format_version": VERSION, "expires": repr(kept.expires)}
    arrays = {}
    if record.code is not None:
        arrays["code"] = record.code.values_Z
        facts = {"model": record.code.model_id, "nearest": record.code.nearest, "scale": record.deviation_scale}
        about["code"] = json.dumps(facts)
    if record.vector_N is not None:
        arrays["vector"] = record.vector_N
    if kept.tokens:
        about["tokens"] = " ".join(kept.tokens)
    if kept.gone:
        about["gone"] = kept.gone
    return checksum.seal(save({key: np.ascontiguousarray(a, "<f4") for key, a in arrays.items()}, about))


def from_bytes(data: bytes) -> Kept:
    """Raises ValueError for what is damaged, of another version, or none at all."""
    try:
        if not checksum.check(data):
            raise ValueError("it has no checksum")
        arrays = load(data)
        about = checksum.notes(data)
        if (about["format"], about["format_version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {about['format']} {about['format_version']}, not {FORMAT} {VERSION}")
        code = None
        facts = json.loads(about.get("code", "{}"))
        if "code" in arrays:
            code = Code(arrays["code"], facts["model"], facts["nearest"])
        record = LoRARecord(code, facts.get("scale"), arrays.get("vector"))
        gone = about.get("gone", "")
        tokens = tuple(about.get("tokens", "").split())
        return Kept(None if gone else record, float(about["expires"]), tokens, gone)
    except Exception as error:  # the parsers have many kinds
        raise ValueError(f"the store holds no record of ours: {error}") from None
