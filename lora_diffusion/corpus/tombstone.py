"""What stays of a person who was forgotten: a place in the plan, under a keyed hash of the name.

The key lies in the corpus' folder, made with it. Who has the folder can ask whether a name was forgotten, but cannot read
names out of it; without the key a hash says nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterable

from lora_diffusion.storage import Store

KEY_FILE = "identity.key"
REASON, MESSAGE = "forgotten", "removed by lora-diffusion forget"
_STONE = re.compile(r"forgotten:[0-9a-f]{32}")


def read_key(store: Store) -> bytes | None:
    """The corpus' key; None for a corpus of an earlier release, until a job goes on with it. Raises ValueError if it is damaged:
    by another key nobody would be known as forgotten."""
    try:
        text = store.read(KEY_FILE).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    found = re.fullmatch(r"\s*([0-9a-f]{64})\s*(?:sha256:([0-9a-f]{16})\s*)?", text)
    if not found or found[2] not in (None, _check(bytes.fromhex(found[1]))):  # an earlier release wrote no checksum
        raise ValueError(f"{store.uri}/{KEY_FILE} is damaged: restore it from a copy")
    return bytes.fromhex(found[1])


def make_key(store: Store, planned: Iterable[str] = ()) -> bytes:
    """The corpus' key, a new one if there is none. Raises ValueError if it is lost, and people of the plan were forgotten."""
    if (key := read_key(store)) is None:
        if stones := set(filter(is_tombstone, planned)):
            raise _lost(store, len(stones))
        key = secrets.token_bytes(32)
        store.write(KEY_FILE, f"{key.hex()}\nsha256:{_check(key)}\n".encode())
    return key


def _check(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()[:16]


def _lost(store: Store, people: int) -> ValueError:
    return ValueError(
        f"{store.uri}/{KEY_FILE} is gone: without it nobody can tell which {people} people were forgotten. Restore it "
        "from a copy"
    )


def keyed_hash(key: bytes, identity: str) -> bytes:
    """16 bytes: HMAC-SHA256 of the name, cut."""
    return hmac.digest(key, identity.encode("utf-8", "surrogateescape"), "sha256")[:16]


def tombstone(key: bytes, identity: str) -> str:
    """What stands for `identity` in the plan."""
    return f"forgotten:{keyed_hash(key, identity).hex()}"


def is_tombstone(identity: str) -> bool:
    return _STONE.fullmatch(identity) is not None


def not_forgotten(store: Store, planned: Iterable[str], identities: Collection[str]) -> Collection[str]:
    """Those of `identities` for whom no tombstone is planned. Raises ValueError if there are some and the key is lost."""
    stones = set(filter(is_tombstone, planned))
    if not stones:
        return identities
    key = read_key(store)
    if key is None:
        raise _lost(store, len(stones))
    return [identity for identity in identities if tombstone(key, identity) not in stones]
