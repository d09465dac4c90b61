"""Writing a corpus so that it can be interrupted anywhere.

    corpus.json                      manifest: what it was made with, counts at the end
    plan/00000.parquet               identities of one part, in the order of their positions
    shards/00012.parquet             the people of shard 12 who are done
    failures/00012.parquet           those who are not, and photos that were left out, with reasons (if there are any)
    statistics/00012.safetensors     count, mean, M2 of the shard's vectors
    statistics.safetensors           the same of all shards, once all are there
    README.md                        dataset card that names the data files
    identity.key                     for the hashes that stand for people who were forgotten

A shard is committed by the last of its three files, `shards/`; the other two are written before it and are worth
nothing without it. Each file is written whole or not at all, a retry overwrites all three, so being killed between any
two bytes loses only the work of that shard. Readers look at `failures/` only where the shard's metadata counts some.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from lora_diffusion.corpus import manifest as manifests
from lora_diffusion.corpus.card import write_card
from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.plan import CorpusError, Plan, ShardPlan, shard_name
from lora_diffusion.corpus.reader import CorpusReader, ShardInfo
from lora_diffusion.corpus.schema import (
    KEPT,
    Failure,
    Person,
    failures_table,
    matrix,
    parquet_bytes,
    people_table,
    person_schema,
)
from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.corpus.tombstone import not_forgotten
from lora_diffusion.storage import Store, side_by_side


class CorpusConflict(CorpusError):
    """The place already holds a corpus that was made otherwise."""


def open_corpus(store: Store, manifest: Manifest) -> Manifest:
    """Begin a corpus, or continue the one that is there; returns the manifest that counts (the first run's).

    Raises CorpusConflict if the one that is there was made with another base model, layout or recipe, StoreError if the
    place cannot be written.
    """
    try:
        there = Manifest.read(store)
    except FileNotFoundError:
        store.write_json(manifests.FILE, manifest.to_dict())
        return manifest
    differences = there.differences(manifest)
    if differences:
        raise CorpusConflict(
            f"{store.uri} already holds a corpus that was made differently; mixing the two would spoil it:\n"
            + "".join(f"  {line}\n" for line in differences)
            + "Choose another output, or set these back to what the corpus was made with."
        )
    return there


def extend_plan(store: Store, plan: Plan, identities: Collection[str]) -> Plan:
    """Give positions to the identities that have none, and write them down before anything is made for them.

    Raises CorpusError where a part of the plan was lost: planned anew, its people would be made anew.
    """
    part = plan.new_part(not_forgotten(store, plan.identities, identities))
    if not part:
        return plan
    if lost := CorpusReader(store).beyond_plan():
        raise CorpusError(
            f"{store.uri}/plan names {len(plan.shards)} shards, but {', '.join(map(shard_name, lost[:5]))} of this corpus "
            f"{'is' if len(lost) == 1 else 'are'} there as well: a part of the plan was lost. Restore it from a copy"
        )
    table = pa.table({"identity": pa.array(part, pa.string())})
    metadata = {"part": len(plan.parts), "start": len(plan.identities), "people_per_shard": plan.people_per_shard}
    store.write(f"plan/{shard_name(len(plan.parts))}.parquet", parquet_bytes(table, metadata))
    return replace(plan, parts=(*plan.parts, part))


class ShardWriter:
    """Commits shards; one in each worker."""

    def __init__(self, store: Store, manifest: Manifest, vector_dtype: str = "float32") -> None:
        self.store = store
        self.manifest = manifest
        self.schema = person_schema(manifest.vector_size, vector_dtype, manifest.consent)
        keys = (
            "format",
            "format_version",
            "layout_id",
            "recipe_id",
            "layout",
            "base",
            "recogniser",
            "config",
            "versions",
        )
        self.metadata = {key: manifest.to_dict()[key] for key in keys}

    def commit(self, shard: ShardPlan, people: Sequence[Person], failures: Sequence[Failure]) -> ShardInfo:
        """Write shard `shard` whole. Every identity of it must be among `people` or the failed people, exactly once."""
        people = sorted(people, key=lambda person: person.position)
        return write_shard(self.store, shard, people_table(people, self.schema), failures, self.metadata)


def write_shard(
    store: Store, shard: ShardPlan, table: pa.Table, failures: Sequence[Failure], metadata: Mapping[str, Any]
) -> ShardInfo:
    """Commit the three files of a shard. `table`: its people, in order. `metadata`: of the corpus; the counts are added.

    Raises CorpusError, and writes nothing, unless every planned identity is in exactly one of the two.
    """
    failures = sorted(failures, key=lambda f: (f.position, f.photo is not None, f.photo or ""))
    failed = [failure.identity for failure in failures if failure.photo is None]
    answered = sorted(table["identity"].to_pylist() + failed)
    if answered != sorted(shard.identities):
        raise CorpusError(
            f"shard {shard.name} is planned for {sorted(shard.identities)}, not for {answered}: not committed"
        )
    metadata = {
        **metadata,
        **{"shard": shard.index, "start": shard.start, "num_planned": len(shard.identities)},
        **{"num_people": len(table), "num_failed": len(failed), "num_failure_rows": len(failures)},
    }
    statistics = Statistics.of(matrix(table["vector"]))
    if failures:
        store.write(f"failures/{shard.name}.parquet", parquet_bytes(failures_table(failures), metadata))
    else:
        store.delete(f"failures/{shard.name}.parquet")
    store.write(f"statistics/{shard.name}.safetensors", statistics.to_bytes())
    store.write(f"shards/{shard.name}.parquet", parquet_bytes(table, metadata))
    return ShardInfo(shard.index, len(table), tuple(failures))


def finish_corpus(store: Store, manifest: Manifest, infos: Sequence[ShardInfo]) -> Manifest:
    """Merge the statistics and write the counts. `infos` of all shards, each verified (`CorpusReader.verify`)."""
    indices = [info.index for info in infos]
    if indices != list(range(len(indices))):
        raise CorpusError(f"the corpus at {store.uri} is not complete: it has shards {indices}, in this order")
    parts = side_by_side(lambda info: _statistics(store, info, manifest), infos)
    total = Statistics.merged(parts, manifest.vector_size)
    store.write("statistics.safetensors", total.to_bytes())
    manifest = replace(manifest, state="complete", counts=count(infos))
    write_card(store, manifest, infos)
    store.write_json(manifests.FILE, manifest.to_dict())
    return manifest


def _statistics(store: Store, info: ShardInfo, manifest: Manifest) -> Statistics:
    """Of one shard: as they were written, or from its vectors if the file is damaged or gone."""
    try:
        part = Statistics.from_bytes(store.read(f"statistics/{shard_name(info.index)}.safetensors"))
    except (ValueError, FileNotFoundError):
        return restore_statistics(store, info.index)
    fits = part.count == info.num_people and len(part.mean) == manifest.vector_size
    return part if fits else restore_statistics(store, info.index)


def restore_statistics(store: Store, index: int) -> Statistics:
    """Write the statistics of a committed shard anew, from its vectors: the same bytes, and nobody is fine-tuned again."""
    statistics = Statistics.of(CorpusReader(store).shard_vectors(index))
    store.write(f"statistics/{shard_name(index)}.safetensors", statistics.to_bytes())
    return statistics


def count(infos: Sequence[ShardInfo]) -> dict[str, object]:
    """People done, people failed by reason, photos left out or used with a fault by reason."""
    failed: dict[str, int] = {}
    dropped: dict[str, int] = {}
    kept: dict[str, int] = {}
    for failure in (failure for info in infos for failure in info.failures):
        counter = failed if failure.photo is None else kept if failure.stage == KEPT else dropped
        counter[failure.reason] = counter.get(failure.reason, 0) + 1
    return {
        "num_shards": len(infos),
        "num_people": int(np.sum([info.num_people for info in infos], dtype=int)),
        "num_failed": sum(failed.values()),
        "failed_by_reason": dict(sorted(failed.items())),
        "photos_dropped_by_reason": dict(sorted(dropped.items())),
        **({"photos_kept_by_reason": kept} if kept else {}),
    }
