"""What stays of a person who was forgotten: a place in the plan, under a keyed hash of the name.

The key lies in the corpus' folder, made with it. Who has the folder can ask whether a name was forgotten, but cannot read
names out of it; without the key a hash says nothing.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Collection, Iterable

from lora_diffusion.storage import Store

KEY_FILE = "identity.key"
REASON, MESSAGE = "forgotten", "removed by lora-diffusion forget"
_STONE = re.compile(r"forgotten:[0-9a-f]{32}")


def read_key(store: Store) -> bytes | None:
    """The corpus' key; None for a corpus of an earlier release, until a job goes on with it. Raises ValueError if it is cut."""
    try:
        text = store.read(KEY_FILE).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{store.uri}/{KEY_FILE} does not hold 64 hex digits: restore it from a copy")
    return bytes.fromhex(text)


def make_key(store: Store) -> bytes:
    """The corpus' key, a new one if there is none."""
    if (key := read_key(store)) is None:
        key = secrets.token_bytes(32)
        store.write(KEY_FILE, f"{key.hex()}\n".encode())
    return key


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
        raise ValueError(
            f"{store.uri}/{KEY_FILE} is gone: without it nobody can tell which {len(stones)} people were forgotten. Restore it "
            "from a copy"
        )
    return [identity for identity in identities if tombstone(key, identity) not in stones]
