"""The shards that a training learns from, fixed when it begins, and whether they are still what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.artifacts import checksum
from lora_diffusion.artifacts.identity import Identity, ModelId
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.corpus.plan import CorpusError, shard_name
from lora_diffusion.corpus.reader import opened
from lora_diffusion.corpus.schema import parquet_metadata
from lora_diffusion.corpus.tombstone import is_tombstone
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import open_store

MADE_ANEW = (
    "Run `lora-diffusion verify` with --repair on the corpus, then its jobs/build_corpus.py command again: it makes damaged "
    "shards anew"
)


@dataclass(frozen=True)
class CorpusSnapshot:
    """The shards that a run learns from, fixed when it begins: a corpus that grows meanwhile changes nothing.

    `shards` maps index -> [rows, bytes of the file].
    """

    uri: str
    layout: Mapping[str, Any]
    base: Mapping[str, str]
    recipe_id: str
    vector_dtype: str
    shards: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    num_failed: int = 0  # people who never got a LoRA
    finetune: Mapping[str, Any] = field(default_factory=dict)  # the recipe that made the LoRAs
    recogniser: Mapping[str, str] = field(default_factory=dict)
    start: str | None = None

    @property
    def identity(self) -> Identity:
        """What the LoRAs belong to."""
        base, recogniser = ModelId.of(self.base), ModelId.of(self.recogniser)
        return Identity(base, recogniser, self.layout_id, self.start, self.recipe_id)

    @property
    def layout_id(self) -> str:
        return str(self.layout["layout_id"])

    @property
    def vector_size(self) -> int:
        return int(self.layout["size"])

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.shards.values())

    @property
    def starts(self) -> dict[int, int]:
        """Shard index -> slot of its first row in the cache."""
        starts, total = {}, 0
        for index in sorted(self.shards):
            starts[index] = total
            total += self.shards[index][0]
        return starts

    @property
    def key(self) -> str:
        """Name of the cache of these rows: 16 hex digits. The recipe's id stands for recogniser and start, too."""
        rows = {name: value for name, value in self.to_dict().items() if name not in ("recogniser", "start")}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "shards": {str(index): list(self.shards[index]) for index in sorted(self.shards)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CorpusSnapshot:
        """Inverse of `to_dict`. Raises ValueError for anything else."""
        try:
            shards = {int(index): (int(rows), int(size)) for index, (rows, size) in values["shards"].items()}
            snapshot = cls(**{**checksum.unsealed(values), "shards": shards})
            LoRALayout.from_dict(snapshot.layout)
            _ = snapshot.identity, np.dtype(snapshot.vector_dtype)
        except Exception as error:  # a file that somebody edited: names and kinds are what they are
            raise ValueError(
                f"it does not say which rows a training began with ({type(error).__name__}: {error})"
            ) from error
        return snapshot


def take_snapshot(uri: str) -> CorpusSnapshot:
    """What is committed at `uri` now. Reads the shards' footers only.

    Raises ValueError for no corpus, an empty one, fewer than two rows, or shards that are missing or damaged.
    """
    reader = CorpusReader(uri)
    sizes = reader.store.files("shards")
    expected = reader.manifest.counts.get("num_shards") if reader.manifest.state == "complete" else None
    if expected is not None and len(reader.shards) < expected:
        there = set(reader.shards)
        lost = list(islice((index for index in range(expected) if index not in there), 5))
        raise ValueError(
            f"the corpus at {uri} says that it is complete with {expected} shards, but {len(reader.shards)} are there "
            f"(missing: {', '.join(map(shard_name, lost))}). Run its jobs/build_corpus.py command again: it makes them anew"
        )
    stones = [shard for shard in reader.plan.shards if any(map(is_tombstone, shard.identities))]
    if stones and (problems := reader.verify(stones)[1]):
        index, problem = next(iter(problems.items()))
        raise ValueError(
            f"shard {index} of {uri} {problem}, and a person of it was forgotten: give the command lora-diffusion forget again, or that of "
            "its corpus job, which ends what was begun"
        )
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(lambda index: _footer(reader, index), reader.shards))
    shards = {
        index: (count, sizes[f"{shard_name(index)}.parquet"]) for index, count in zip(reader.shards, rows, strict=True)
    }
    identity = reader.manifest.identity
    snapshot = CorpusSnapshot(
        uri=reader.store.uri,
        layout=reader.manifest.layout,
        base=reader.manifest.base,
        recipe_id=reader.manifest.recipe_id,
        vector_dtype=_vector_dtype(reader),
        shards=shards,
        num_failed=int(reader.manifest.counts.get("num_failed", 0)),
        finetune=reader.manifest.recipe.get("finetune", {}),
        recogniser=asdict(identity.recogniser),
        start=identity.start,
    )
    if snapshot.num_rows < 2:
        raise ValueError(
            f"the corpus at {uri} has {snapshot.num_rows} people with a LoRA; training needs at least 2, and some "
            "hundreds to learn anything. Add people with jobs/build_corpus.py"
        )
    return snapshot


def check_snapshot(snapshot: CorpusSnapshot) -> None:
    """Raises ValueError if the shards that a run began with are no longer what they were."""
    now = open_store(snapshot.uri).files("shards")
    for index, (_, size) in snapshot.shards.items():
        found = now.get(f"{shard_name(index)}.parquet")
        if found != size:
            state = "is gone" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(
                f"shard {shard_name(index)} of {snapshot.uri} {state}: it is not what this run began with. "
                "Restore it, or choose another output to begin anew"
            )


def _vector_dtype(reader: CorpusReader) -> str:
    if not reader.shards:
        return "float32"
    value = reader.schema.field("vector").type.value_type
    return {pa.float16(): "float16", pa.float32(): "float32"}[value]


def _footer(reader: CorpusReader, index: int) -> int:
    """Rows of a shard. Raises ValueError if it is damaged, or of another place, layout or recipe."""
    store, layout, recipe_id = reader.store, reader.layout, reader.manifest.recipe_id
    try:
        with opened(store, f"shards/{shard_name(index)}.parquet") as file:
            parquet = pq.ParquetFile(file)
            metadata = parquet_metadata(parquet.schema_arrow)
            rows = parquet.metadata.num_rows
    except CorpusError as error:
        raise ValueError(f"{str(error).rstrip('. ')}. {MADE_ANEW}") from error
    if metadata.get("layout_id") != layout.layout_id:
        raise ValueError(
            f"shard {shard_name(index)} of {store.uri} has layout_id {metadata.get('layout_id')}, the corpus has "
            f"{layout.layout_id}: two corpora were mixed in one folder. Keep each in a folder of its own"
        )
    if (metadata.get("recipe_id"), metadata.get("shard")) != (recipe_id, index):
        raise ValueError(
            f"shard {shard_name(index)} of {store.uri} is shard {metadata.get('shard')} made with recipe "
            f"{metadata.get('recipe_id')}, the corpus has {recipe_id}: two corpora were mixed in one folder. Run its "
            "jobs/build_corpus.py command again: it makes such shards anew"
        )
    return int(rows)
