"""Reading a corpus: rows, vectors, statistics, failures; and the check that it is whole.

Any Parquet reader reads `shards/*.parquet` as well; this one also knows the layout and skips what is not committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.corpus import manifest as manifests
from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.plan import Plan, ShardPlan, shard_name
from lora_diffusion.corpus.schema import Failure, failures_from_table, matrix, parquet_metadata
from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store, open_store


@dataclass(frozen=True)
class ShardInfo:
    """What a committed shard holds; `failures` are its people who failed and its photos that were left out."""

    index: int
    num_people: int
    failures: tuple[Failure, ...]


class CorpusReader:
    """A corpus at `uri` (folder or s3://), complete or still growing: what is committed now.

    Raises ValueError if there is no corpus, StoreError if it cannot be read.
    """

    def __init__(self, uri: str | Path | Store) -> None:
        self.store = uri if isinstance(uri, Store) else open_store(uri)
        try:
            self.manifest = Manifest.from_dict(self.store.read_json(manifests.FILE))
        except FileNotFoundError as error:
            raise ValueError(
                f"no corpus at {self.store.uri}: it has no {manifests.FILE}. Make one with jobs/build_corpus.py"
            ) from error
        self.layout = LoRALayout.from_dict(self.manifest.layout)

    @cached_property
    def plan(self) -> Plan:
        """Who lies where."""
        names = sorted(self.store.files("plan"))
        groups = self.manifest.recipe["groups"]
        parts = (
            tuple(pq.read_table(pa.BufferReader(data))["identity"].to_pylist())
            for data in self.store.read_many(f"plan/{name}" for name in names)
        )
        return Plan(tuple(parts), groups["people_per_group"], groups["groups_per_shard"])

    @cached_property
    def shards(self) -> list[int]:
        """Indices of the committed shards, ascending."""
        names = self.store.files("shards")
        return sorted(int(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet"))

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the people; see docs/reference/formats.md. Raises ValueError if no shard is committed."""
        if not self.shards:
            raise ValueError(f"the corpus at {self.store.uri} has no people yet")
        with self.store.open(f"shards/{shard_name(self.shards[0])}.parquet") as file:
            return pq.read_schema(file)

    def __len__(self) -> int:
        """Number of people with a LoRA."""
        return sum(metadata["num_people"] for metadata in self._map(self._metadata))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """One table for each shard, in order: constant memory whatever the size of the corpus."""
        wanted = list(columns) if columns is not None else None
        for index in self.shards:
            with self.store.open(f"shards/{shard_name(index)}.parquet") as file:
                yield pq.read_table(file, columns=wanted)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All people, in the order of their positions. Leave out `vector` where it is not needed: it is the bulk."""
        schema = self.schema
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        tables = [table.replace_schema_metadata(None) for table in self.tables(columns)]
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def sample(self, count: int, columns: Sequence[str]) -> pa.Table:
        """At most `count` people, evenly spread over the corpus; reads only the shards where they lie."""
        sizes = [int(metadata["num_people"]) for metadata in self._map(self._metadata)]
        wanted = {round(row) for row in np.linspace(0, sum(sizes) - 1, min(count, sum(sizes)))}
        start, tables = 0, []
        for index, size in zip(self.shards, sizes, strict=True):
            rows = sorted(row - start for row in wanted if start <= row < start + size)
            start += size
            if rows:
                with self.store.open(f"shards/{shard_name(index)}.parquet") as file:
                    tables.append(pq.read_table(file, columns=list(columns)).take(rows).replace_schema_metadata(None))
        return pa.concat_tables(tables) if tables else self.table(columns)

    @property
    def identities(self) -> list[str]:
        """Names of the people with a LoRA, in the order of `vectors` and `embeddings`."""
        names: list[str] = self.table(["identity"])["identity"].to_pylist()
        return names

    def vectors(self) -> np.ndarray:
        """(P, N) in the stored dtype: all LoRAs, 4 bytes × N × P of memory for float32."""
        return matrix(self.table(["vector"])["vector"])

    def embeddings(self) -> np.ndarray:
        """(P, 512) float32, unit norm."""
        return matrix(self.table(["embedding"])["embedding"])

    def statistics(self) -> Statistics:
        """Of the complete corpus as gathered while it was written; of an incomplete one, merged from its shards now."""
        if self.manifest.state == "complete":
            return Statistics.from_bytes(self.store.read("statistics.safetensors"))
        names = [f"statistics/{shard_name(index)}.safetensors" for index in self.shards]
        parts = map(Statistics.from_bytes, self.store.read_many(names))
        return Statistics.merged(parts, self.layout.size)

    def failures(self) -> list[Failure]:
        """People without a LoRA and photos that were left out, with reasons."""
        found = self._map(lambda index: self._failures(index, self._metadata(index)))
        return [failure for failures in found for failure in failures]

    def verify(self, shards: Sequence[ShardPlan] | None = None) -> tuple[list[ShardInfo], dict[int, str]]:
        """Check that each committed shard can be read and answers for each of its planned people exactly once.

        Returns what the good ones hold, in order, and index -> what is wrong for the others. A shard that is not
        committed is in neither. Reads two small columns, no vectors.
        """
        committed = set(self.shards)
        planned = {shard.index: shard for shard in (self.plan.shards if shards is None else shards)}
        statistics = self.store.files("statistics")
        checked = self._map(
            lambda index: self._verify_one(planned[index], statistics), sorted(committed & planned.keys())
        )
        infos, problems = [], {}
        for result in checked:
            if isinstance(result, ShardInfo):
                infos.append(result)
            else:
                problems.update(result)
        return infos, problems

    def _verify_one(self, shard: ShardPlan, statistics: dict[str, int]) -> ShardInfo | dict[int, str]:
        try:
            with self.store.open(f"shards/{shard.name}.parquet") as file:
                parquet = pq.ParquetFile(file)
                metadata = parquet_metadata(parquet.schema_arrow)
                done = parquet.read(columns=["identity"])["identity"].to_pylist()
            failures = self._failures(shard.index, metadata)
        except (pa.ArrowInvalid, ValueError, FileNotFoundError) as error:
            return {shard.index: f"cannot be read: {error}"}
        failed = [failure.identity for failure in failures if failure.photo is None]
        if metadata["recipe_id"] != self.manifest.recipe_id:
            return {shard.index: f"was made with recipe {metadata['recipe_id']}, not {self.manifest.recipe_id}"}
        if sorted(done + failed) != sorted(shard.identities):
            return {shard.index: f"holds {len(done)} people and {len(failed)} failed, not the planned ones"}
        if f"{shard.name}.safetensors" not in statistics:
            return {shard.index: "has no statistics"}
        return ShardInfo(shard.index, len(done), tuple(failures))

    def _metadata(self, index: int) -> dict[str, int]:
        with self.store.open(f"shards/{shard_name(index)}.parquet") as file:
            return parquet_metadata(pq.read_schema(file))

    def _failures(self, index: int, metadata: dict[str, int]) -> list[Failure]:
        if not metadata["num_failure_rows"]:
            return []
        data = self.store.read(f"failures/{shard_name(index)}.parquet")
        failures = failures_from_table(pq.read_table(pa.BufferReader(data)))
        if len(failures) != metadata["num_failure_rows"]:
            raise ValueError(f"failures of shard {index} are not those that were committed with it")
        return failures

    def _map(self, function, indices: Sequence[int] | None = None):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(function, self.shards if indices is None else indices))
