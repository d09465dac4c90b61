"""People on their way between workers, as Arrow tables: one row for each person, one table for each shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from lora_diffusion.corpus.plan import CorpusError, ShardPlan
from lora_diffusion.corpus.schema import FAILURE_SCHEMA, Failure
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.people import PersonRef

NOBODY = -1  # position of a row that only fills a shard up to its full length

_PLANNED = pa.schema(
    [
        ("shard", pa.int64()),
        ("start", pa.int64()),
        ("position", pa.int64()),
        ("identity", pa.string()),
        ("where", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
_EMBEDDED = pa.schema(
    [
        ("shard", pa.int64()),
        ("start", pa.int64()),
        ("position", pa.int64()),
        ("identity", pa.string()),
        ("pictures", pa.list_(pa.large_binary())),
        ("captions", pa.list_(pa.string())),
        ("face_boxes", pa.list_(pa.list_(pa.float32()))),
        ("embedding", pa.list_(pa.float32())),
        ("photo_embeddings", pa.list_(pa.list_(pa.float32()))),
        ("photo_similarity", pa.float64()),
        ("photo_sha256", pa.list_(pa.string())),
        ("seconds", pa.float64()),
        ("failures", pa.list_(pa.struct(list(FAILURE_SCHEMA)))),
    ]
)


def planned_table(shard: ShardPlan, people: Sequence[PersonRef], rows: int) -> pa.Table:
    """The people of a shard and where their photos are, filled up to `rows`, so that all tables are equally long."""
    found = [
        {
            "shard": shard.index,
            "start": shard.start,
            "position": position,
            "identity": person.identity,
            "where": person.where,
            "reason": person.problem and person.problem[0],
            "message": person.problem and person.problem[1],
        }
        for position, person in zip(shard.positions, people, strict=True)
    ]
    nobody = {"shard": shard.index, "start": shard.start, "position": NOBODY, "identity": "", "where": ""}
    return pa.Table.from_pylist(found + [nobody] * (rows - len(found)), schema=_PLANNED)


def people_of(table: pa.Table) -> list[tuple[int, PersonRef]]:
    """(position, person) of a planned table, without the rows that fill it up."""
    return [
        (row["position"], PersonRef(row["identity"], row["where"], row["reason"] and (row["reason"], row["message"])))
        for row in table.to_pylist()
        if row["position"] != NOBODY
    ]


def embedded_table(planned: pa.Table, people: Sequence[EmbeddedPerson]) -> pa.Table:
    """What the embedding worker hands on; as many rows as `planned`."""
    shard, start = planned["shard"][0].as_py(), planned["start"][0].as_py()
    filling = [EmbeddedPerson(NOBODY, "")] * (len(planned) - len(people))
    names = [field.name for field in fields(Failure)]
    rows = [
        {
            "shard": shard,
            "start": start,
            "position": person.position,
            "identity": person.identity,
            "pictures": person.pictures,
            "captions": person.captions,
            "face_boxes": None if person.face_boxes is None else list(person.face_boxes),
            "embedding": person.embedding,
            "photo_embeddings": None if person.photo_embeddings is None else list(person.photo_embeddings),
            "photo_similarity": person.photo_similarity,
            "photo_sha256": person.photo_sha256,
            "seconds": person.seconds,
            "failures": [{name: getattr(failure, name) for name in names} for failure in person.failures],
        }
        for person in [*people, *filling]
    ]
    return pa.Table.from_pylist(rows, schema=_EMBEDDED)


def embedded_people(table: pa.Table, people_per_group: int) -> tuple[ShardPlan, list[EmbeddedPerson]]:
    """The shard and its people, of a table that holds exactly one shard."""
    rows = [row for row in table.to_pylist() if row["position"] != NOBODY]
    if len({row["shard"] for row in rows}) != 1:
        raise CorpusError(
            f"a table with people of shards {sorted({row['shard'] for row in rows})}; expected one whole shard"
        )
    people = [
        EmbeddedPerson(
            position=row["position"],
            identity=row["identity"],
            pictures=tuple(row["pictures"]),
            captions=None if row["captions"] is None else tuple(row["captions"]),
            face_boxes=_floats(row["face_boxes"]),
            embedding=_floats(row["embedding"]),
            photo_embeddings=_floats(row["photo_embeddings"]),
            photo_similarity=row["photo_similarity"],
            photo_sha256=tuple(row["photo_sha256"]),
            seconds=row["seconds"],
            failures=tuple(Failure(**failure) for failure in row["failures"]),
        )
        for row in rows
    ]
    identities = tuple(person.identity for person in people)
    shard = ShardPlan(rows[0]["shard"], rows[0]["start"], identities, people_per_group)
    if [person.position for person in people] != list(shard.positions):
        raise CorpusError(f"shard {shard.name}: people {[person.position for person in people]}, not {shard.positions}")
    return shard, people


def _floats(values: list[Any] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.float32)
