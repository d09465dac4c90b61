"""Reading a corpus: rows, vectors, statistics, failures; and the check that it is whole.

Any Parquet reader reads `shards/*.parquet` as well; this one also knows the layout and skips what is not committed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.artifacts import checksum
from lora_diffusion.corpus import manifest as manifests
from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.plan import CorpusError, Plan, ShardPlan, file_index, shard_name
from lora_diffusion.corpus.schema import Failure, check_columns, failures_from_table, matrix, parquet_metadata
from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store, StoreError, open_store

_COUNTS = ("num_people", "num_failure_rows")
NO_STATISTICS = "has no whole statistics"


@dataclass(frozen=True)
class ShardInfo:
    """What a committed shard holds; `failures` are its people who failed and its photos that were left out."""

    index: int
    num_people: int
    failures: tuple[Failure, ...]


def read_statistics(store: Store, names: Sequence[str], size: int) -> Statistics:
    """Of all files, merged in their order. Raises CorpusError with the name of one that is damaged or of other vectors."""

    def parts() -> Iterator[Statistics]:
        for name, data in zip(names, store.read_many(names), strict=True):
            try:
                part = Statistics.from_bytes(data)
            except ValueError as error:
                raise CorpusError(f"{store.uri}/{name} cannot be read: {error}") from error
            if len(part.mean) != size:
                raise CorpusError(
                    f"{store.uri}/{name} is of vectors of {len(part.mean)} numbers, the corpus' have {size}"
                )
            yield part

    return Statistics.merged(parts(), size)


@contextmanager
def opened(store: Store, name: str, whole: bool = False) -> Iterator[IO[bytes]]:
    """A Parquet file. Raises CorpusError with its name for whatever a damaged one makes Arrow raise inside.

    whole: all of it is read at once, and the checksum of the file compared; else those of the pages that are asked for.
    """
    try:
        if whole:
            data = store.read(name)
            checksum.check_parquet(data)
        with pa.BufferReader(data) if whole else store.open(name) as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{store.uri}/{name} does not exist") from None
    except StoreError:
        raise
    except Exception as error:  # damaged bytes meet Arrow with many kinds of error
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; Parquet's own have no number
            raise StoreError(f"cannot read {store.uri}/{name}: {error}") from error
        raise CorpusError(f"{store.uri}/{name} cannot be read: {error or type(error).__name__}") from error


def _read(file: IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """With the pages' checksums compared, where they have some; a page's header is not in its checksum, so rows are counted."""
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    table = parquet.read(columns=None if columns is None else list(columns))
    if len(table) != parquet.metadata.num_rows:
        raise CorpusError(f"it has {len(table)} rows of {parquet.metadata.num_rows}")
    if lost := set(columns or ()) - set(table.column_names):
        raise CorpusError(f"it has no column {min(lost)}")
    return check_columns(table)


class CorpusReader:
    """A corpus at `uri` (folder or s3://), complete or still growing: what is committed now.

    Raises ValueError if there is no corpus, StoreError if it cannot be read.
    """

    def __init__(self, uri: str | Path | Store) -> None:
        self.store = uri if isinstance(uri, Store) else open_store(uri)
        try:
            self.manifest = Manifest.read(self.store)
        except FileNotFoundError as error:
            raise ValueError(
                f"no corpus at {self.store.uri}: it has no {manifests.FILE}. Make one with jobs/build_corpus.py"
            ) from error
        self.layout = LoRALayout.from_dict(self.manifest.layout)

    def __repr__(self) -> str:
        return f"CorpusReader({self.store.uri!r}, {self.manifest.state})"

    @cached_property
    def plan(self) -> Plan:
        """Who lies where."""
        groups = self.manifest.recipe["groups"]
        numbers = self._numbers("plan")
        if numbers != list(range(len(numbers))):
            raise CorpusError(f"{self.store.uri}/plan has parts {numbers}: one is missing. Restore it from a copy")
        parts = self._map(lambda part: self._column(f"plan/{shard_name(part)}.parquet", "identity"), numbers)
        return Plan(tuple(map(tuple, parts)), groups["people_per_group"], groups["groups_per_shard"])

    @cached_property
    def shards(self) -> list[int]:
        """Indices of the committed shards, ascending. What lies beside them and is none of the plan is left alone."""
        planned = len(self.plan.shards)
        return self._numbers("shards", lambda index: not planned or index < planned)

    def _numbers(self, folder: str, known: Callable[[int], bool] = lambda _: True) -> list[int]:
        """The numbers of our files in `folder`, ascending; a warning names the others, once."""
        names = sorted(self.store.files(folder))
        numbers = {name: file_index(name) for name in names}
        ours = sorted(index for index in numbers.values() if index is not None and known(index))
        if others := [name for name, index in numbers.items() if index not in ours]:
            text = f"{self.store.uri}/{folder}: left alone, as no file of this corpus: {', '.join(map(repr, others))}"
            warnings.warn(text, stacklevel=3)
        return ours

    def _parquet(self, name: str, read: Callable[[IO[bytes]], Any]) -> Any:
        with opened(self.store, name) as file:
            return read(file)

    def _column(self, name: str, column: str) -> list[Any]:
        return list(self._parquet(name, lambda file: _read(file, [column])[column].to_pylist()))

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the people; see docs/reference/formats.md. Raises ValueError if no shard is committed."""
        if not self.shards:
            raise ValueError(f"the corpus at {self.store.uri} has no people yet")
        return self._parquet(f"shards/{shard_name(self.shards[0])}.parquet", pq.read_schema)

    def __len__(self) -> int:
        """Number of people with a LoRA."""
        return sum(metadata["num_people"] for metadata in self._map(self._metadata))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """One table for each shard, in order: constant memory whatever the size of the corpus."""
        for index in self.shards:
            yield self._table(index, columns)

    def _table(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        def read(file: IO[bytes]) -> pa.Table:
            table = _read(file, columns)
            self._check_shard(index, parquet_metadata(table.schema))
            return table

        return self._parquet(f"shards/{shard_name(index)}.parquet", read)

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
                tables.append(self._table(index, columns).take(rows).replace_schema_metadata(None))
        return pa.concat_tables(tables) if tables else self.table(columns)

    @property
    def identities(self) -> list[str]:
        """Names of the people with a LoRA, in the order of `vectors` and `embeddings`."""
        names: list[str] = self.table(["identity"])["identity"].to_pylist()
        return names

    def vectors(self) -> np.ndarray:
        """(P, N) in the stored dtype: all LoRAs, 4 bytes × N × P of memory for float32."""
        return matrix(self.table(["vector"])["vector"])

    def shard_vectors(self, index: int) -> np.ndarray:
        """(people of this shard, N) in the stored dtype."""
        return matrix(self._table(index, ["vector"])["vector"])

    def embeddings(self) -> np.ndarray:
        """(P, 512) float32, unit norm."""
        return matrix(self.table(["embedding"])["embedding"])

    def statistics(self) -> Statistics:
        """Of the complete corpus as gathered while it was written; of an incomplete one, merged from its shards now."""
        if self.manifest.state == "complete":
            return read_statistics(self.store, ["statistics.safetensors"], self.layout.size)
        names = [f"statistics/{shard_name(index)}.safetensors" for index in self.shards]
        return read_statistics(self.store, names, self.layout.size)

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
            metadata = self._metadata(shard.index)
            done = self._column(f"shards/{shard.name}.parquet", "identity")
            failures = self._failures(shard.index, metadata)
        except (ValueError, FileNotFoundError) as error:
            return {shard.index: f"cannot be read: {error}"}
        failed = [failure.identity for failure in failures if failure.photo is None]
        if sorted(done + failed) != sorted(shard.identities):
            return {shard.index: f"holds {len(done)} people and {len(failed)} failed, not the planned ones"}
        name = f"{shard.name}.safetensors"
        if not self._is_whole(f"statistics/{name}", statistics.get(name, 0)):
            return {shard.index: NO_STATISTICS}
        return ShardInfo(shard.index, len(done), tuple(failures))

    def has_whole_statistics(self) -> bool:
        """Whether `statistics.safetensors` is there and was not cut."""
        return self._is_whole("statistics.safetensors", self.store.files().get("statistics.safetensors", 0))

    def _is_whole(self, statistics: str, size: int) -> bool:
        """Whether the file is as long as its header's length says: a request of 8 bytes, where the whole may be megabytes."""
        if size < 8:
            return False
        header = int.from_bytes(self.store.read_part(statistics, 0, 8), "little")
        return size == 8 + header + 8 * (1 + 3 * self.layout.size)  # count; mean, M2 and std

    def _metadata(self, index: int) -> dict[str, Any]:
        def read(file: IO[bytes]) -> dict[str, Any]:
            metadata = parquet_metadata(pq.read_schema(file))
            self._check_shard(index, metadata)
            return metadata

        return dict(self._parquet(f"shards/{shard_name(index)}.parquet", read))

    def _check_shard(self, index: int, metadata: dict[str, Any]) -> None:
        """Raises CorpusError for a file of another place or recipe: its vectors mean something else."""
        if metadata.get("shard") != index or not all(type(metadata.get(key)) is int for key in _COUNTS):
            raise CorpusError(f"it is shard {metadata.get('shard')} of another place, or was edited")
        if metadata.get("recipe_id") != self.manifest.recipe_id:
            raise CorpusError(
                f"it was made with recipe {metadata.get('recipe_id')}, the corpus has {self.manifest.recipe_id}. "
                "Run its jobs/build_corpus.py command again: it makes such shards anew"
            )

    def beyond_plan(self) -> list[int]:
        """Committed shards that say they are of this corpus, but that no part of the plan names: a part was lost."""
        planned, found = len(self.plan.shards), []
        for index in (index for name in self.store.files("shards") if (index := file_index(name)) is not None):
            with suppress(CorpusError):
                if index >= planned and self._metadata(index):
                    found.append(index)
        return sorted(found)

    def _failures(self, index: int, metadata: dict[str, Any]) -> list[Failure]:
        if not metadata["num_failure_rows"]:
            return []
        failures = self._failure_rows(index)
        if len(failures) != metadata["num_failure_rows"]:
            raise ValueError(f"failures of shard {index} are not those that were committed with it")
        return failures

    def _failure_rows(self, index: int) -> list[Failure]:
        """Whether or not the shard was committed with them."""
        name = f"failures/{shard_name(index)}.parquet"
        return list(self._parquet(name, lambda file: failures_from_table(_read(file))))

    def _map(self, function, indices: Sequence[int] | None = None):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(function, self.shards if indices is None else indices))
