"""A person leaves the neighbours of a synthesiser. What its weights remember stays (benchmarks/membership.py)."""

from __future__ import annotations

import safetensors.torch
import torch
from safetensors import SafetensorError

from lora_diffusion.artifacts import checksum
from lora_diffusion.corpus.tombstone import keyed_hash, read_key
from lora_diffusion.storage import open_store

FILE = "neighbours.safetensors"


def forget_neighbour(synthesizer: str, corpus: str, identity: str) -> int:
    """Remove `identity` from the neighbours in the folder `synthesizer`; returns how many rows that were.

    Raises ValueError if its neighbours have no hashes, or the corpus has no key.
    """
    store, key = open_store(synthesizer), read_key(open_store(corpus))
    if not store.exists("config.json"):
        raise ValueError(f"no synthesiser at {store.uri}: it has no config.json")
    try:
        checksum.check(data := store.read(FILE))
        tensors = safetensors.torch.load(data)
    except FileNotFoundError:
        return 0
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{store.uri}/{FILE} cannot be read: {error}. Copy it again") from error
    if key is None or "hashes_PH" not in tensors:
        raise ValueError(
            f"the neighbours of {store.uri} carry no hashes of names, so nobody can tell which are {identity!r}'s: make a folder "
            f"without neighbours (lora-diffusion publish synthesizer={store.uri} output=FOLDER neighbours=false), or train again"
        )
    mine_H = torch.frombuffer(bytearray(keyed_hash(key, identity)), dtype=torch.uint8)
    others_P = (tensors["hashes_PH"] != mine_H).any(1)
    if not others_P.all():
        left = {name: tensor[others_P] for name, tensor in tensors.items()}
        store.write(FILE, checksum.seal(safetensors.torch.save(left)))
    return int((~others_P).sum())
