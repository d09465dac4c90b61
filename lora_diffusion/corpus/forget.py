"""A person leaves a corpus: vector, embeddings, hashes, failures, name and statistics. Everybody else keeps every bit.

The plan is the point of no return: from then on a tombstone stands where the name stood, and the shard counts as
damaged until its rows follow. Whoever comes next, this command or the corpus job, ends what was begun.
"""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_diffusion.corpus import manifest as manifests
from lora_diffusion.corpus.plan import ShardPlan, shard_name
from lora_diffusion.corpus.reader import CorpusReader
from lora_diffusion.corpus.schema import Failure, parquet_bytes, parquet_metadata
from lora_diffusion.corpus.tombstone import MESSAGE, REASON, is_tombstone, make_key, tombstone
from lora_diffusion.corpus.writer import finish_corpus, write_shard
from lora_diffusion.storage import Store

FOLDERS = ("", "plan", "shards", "failures", "statistics")
# Made of everybody together; the corpus job writes the last two again.
STATISTICS, SUMMARY, CONTACT_SHEET = "statistics.safetensors", "summary.txt", "contact_sheet.png"


def forget(store: Store, identity: str) -> bool:
    """Remove `identity` from the corpus in `store`; no job may write to it meanwhile. False: its shard is to be made again.

    Killed anywhere, the same call ends it. Raises ValueError if there is no such person.
    """
    reader = CorpusReader(store)
    for folder in FOLDERS:  # a killed writer may have left half a shard
        store.sweep(folder)
    stone = tombstone(make_key(store, reader.plan.identities), identity)
    if identity in reader.plan.identities:
        _reopen(reader)
        for part, names in enumerate(reader.plan.parts):
            if identity in names:
                _rename(reader, part, [stone if name == identity else name for name in names])
    elif stone not in reader.plan.identities:
        raise ValueError(f"nobody at {store.uri} is called {identity!r}: give the name as it stands in column identity")
    follow_tombstones(store)
    reader = CorpusReader(store)
    infos, _ = reader.verify()
    whole = len(infos) == len(reader.plan.shards)
    if whole and reader.manifest.state != "complete":
        finish_corpus(store, reader.manifest, infos)
    return whole


def follow_tombstones(store: Store) -> None:
    """Bring the shards in line with the plan's tombstones; nothing to do unless `forget` or a writer was killed."""
    reader = CorpusReader(store)
    shards = [shard for shard in reader.plan.shards if any(map(is_tombstone, shard.identities))]
    if shards:
        committed = set(reader.shards)
        _, problems = reader.verify(shards)
        for shard in shards:
            if shard.index not in committed:  # what a killed writer left of it names people
                _delete(store, shard)
            elif shard.index in problems:
                _follow(reader, shard)


def _reopen(reader: CorpusReader) -> None:
    """Take away what was made of everybody, so that the next run makes it anew."""
    store, manifest = reader.store, replace(reader.manifest, state="building", counts={})
    store.write_json(manifests.FILE, manifest.to_dict())
    for name in (CONTACT_SHEET, SUMMARY, STATISTICS):
        store.delete(name)


def _rename(reader: CorpusReader, part: int, names: list[str]) -> None:
    name = f"plan/{shard_name(part)}.parquet"
    with reader.store.open(name) as file:
        metadata = parquet_metadata(pq.read_schema(file))
    table = pa.table({"identity": pa.array(names, pa.string())})
    reader.store.write(name, parquet_bytes(table, metadata))


def _follow(reader: CorpusReader, shard: ShardPlan) -> None:
    """Leave in a shard whom the plan names, and a failure for each tombstone. One that is damaged goes, and is made again."""
    store = reader.store
    failures = [
        Failure(position, identity, None, "read", REASON, MESSAGE)
        for position, identity in zip(shard.positions, shard.identities, strict=True)
        if is_tombstone(identity)
    ]
    try:
        table = reader._table(shard.index)
        metadata = parquet_metadata(table.schema)
        table = table.filter(pc.is_in(table["identity"], pa.array(shard.identities)))
        stones = {failure.identity for failure in failures}
        found = reader._failure_rows(shard.index) if reader.store.exists(f"failures/{shard.name}.parquet") else []
        failures += [one for one in found if one.identity in shard.identities and one.identity not in stones]
        write_shard(store, shard, table, failures, metadata)
    except (ValueError, FileNotFoundError):
        _delete(store, shard)


def _delete(store: Store, shard: ShardPlan) -> None:
    for folder, kind in (("shards", "parquet"), ("failures", "parquet"), ("statistics", "safetensors")):
        store.delete(f"{folder}/{shard.name}.{kind}")
