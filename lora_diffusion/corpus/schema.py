"""The rows of a corpus and their Parquet columns, side by side: the people who are done, and what failed, with reasons.

Axes: P people of one shard, N length of a LoRA vector, E length of an identity embedding (512).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.artifacts import checksum
from lora_diffusion.corpus.plan import CorpusError

EMBEDDING_SIZE = 512
METADATA_KEY = b"lora_diffusion"
VECTOR_DTYPES = {"float32": pa.float32(), "float16": pa.float16()}


@dataclass(frozen=True)
class Person:
    """One person who is done: a row of `shards/`. `position` is the place in the plan, and never changes."""

    position: int
    identity: str
    vector: np.ndarray  # (N,), in the order of the corpus' LoRALayout
    embedding: np.ndarray  # (512,), unit norm: mean of the kept photos' embeddings
    photo_embeddings: np.ndarray  # (num_photos, 512), unit norm, in the order of `photo_sha256`
    similarity: float  # mean cosine of the fine-tuned renders' embeddings with `embedding`
    base_similarity: float  # the same of the base model's renders, without LoRA
    photo_similarity: float  # mean cosine of the photos with each other; NaN for one photo
    loss: float  # denoising loss at the end of fine-tuning
    steps: int
    seed: int
    num_photos: int  # photos that were used
    num_photos_dropped: int  # photos that were not, see `failures/`
    photo_sha256: tuple[str, ...]  # of the used photos' bytes, in the order of their names
    embed_seconds: float
    finetune_seconds: float  # this person's share of its group's time
    score_seconds: float
    consent: str | None = None  # as the source has it


KEPT = "kept"  # stage of a photo with a fault that was used all the same


@dataclass(frozen=True)
class Failure:
    """A row of `failures/`: a person who has no LoRA (`photo` is None), or one photo that was left out, or `KEPT`."""

    position: int
    identity: str
    photo: str | None
    stage: str  # read, embed, finetune, score, or kept
    reason: str  # a word to count by, such as no_face
    message: str  # a sentence for a person


def person_schema(vector_size: int, vector_dtype: str = "float32", consent: bool = False) -> pa.Schema:
    """Columns of `shards/*.parquet`; `consent`: with this column. Raises ValueError for another dtype than float32 or float16."""
    if vector_dtype not in VECTOR_DTYPES:
        raise ValueError(f"vectors can be stored as {' or '.join(VECTOR_DTYPES)}, not as {vector_dtype!r}")
    return pa.schema(
        [
            pa.field("position", pa.int64(), nullable=False),
            pa.field("identity", pa.string(), nullable=False),
            pa.field("similarity", pa.float32()),
            pa.field("base_similarity", pa.float32()),
            pa.field("photo_similarity", pa.float32()),
            pa.field("loss", pa.float32()),
            pa.field("steps", pa.int32()),
            pa.field("seed", pa.int64()),
            pa.field("num_photos", pa.int32()),
            pa.field("num_photos_dropped", pa.int32()),
            *([pa.field("consent", pa.string())] if consent else []),
            pa.field("photo_sha256", pa.list_(pa.string())),
            pa.field("embed_seconds", pa.float32()),
            pa.field("finetune_seconds", pa.float32()),
            pa.field("score_seconds", pa.float32()),
            pa.field("embedding", pa.list_(pa.float32(), EMBEDDING_SIZE)),
            pa.field("photo_embeddings", pa.list_(pa.list_(pa.float32(), EMBEDDING_SIZE))),
            pa.field("vector", pa.list_(VECTOR_DTYPES[vector_dtype], vector_size)),
        ]
    )


FAILURE_SCHEMA = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("photo", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


def _kind(dtype: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(dtype):
        return f"rows of {_kind(dtype.value_type)}"
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):  # large ones: as polars and pandas write them
        return f"lists of {_kind(dtype.value_type)}"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return "text"
    kinds = {"whole numbers": pa.types.is_integer, "numbers": pa.types.is_floating}
    return next((kind for kind, fits in kinds.items() if fits(dtype)), str(dtype))


_KINDS = {
    field.name: _kind(field.type) for field in [*person_schema(1), *person_schema(1, consent=True), *FAILURE_SCHEMA]
}
_NEVER_NULL = ("position", "identity", "embedding", "photo_embeddings", "vector")


def check_columns(table: pa.Table) -> pa.Table:
    """`table` as it is. Raises CorpusError for a column of ours that holds something else, or nothing for somebody."""
    for field, column in zip(table.schema, table.columns, strict=True):
        if (kind := _kind(field.type)) != (expected := _KINDS.get(field.name, kind)):
            raise CorpusError(f"its column {field.name} holds {kind}, not {expected}")
        if column.null_count and field.name in _NEVER_NULL:
            raise CorpusError(f"its column {field.name} is empty for {column.null_count} of {len(table)} rows")
    return table


def people_table(people: Sequence[Person], schema: pa.Schema) -> pa.Table:
    """P rows in the order given. Vectors are cast to the schema's dtype; the caller has seen that they are finite."""
    columns: list[pa.Array] = []
    for field in schema:
        values = [getattr(person, field.name) for person in people]
        if pa.types.is_fixed_size_list(field.type):
            columns.append(_fixed_size_lists(values, field.type))
        elif pa.types.is_list(field.type) and pa.types.is_fixed_size_list(field.type.value_type):
            ends = np.cumsum([0, *map(len, values)])
            rows = [row for value in values for row in value]
            lists = _fixed_size_lists(rows, field.type.value_type)
            columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), lists, type=field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _fixed_size_lists(rows: Sequence[np.ndarray], dtype: pa.DataType) -> pa.Array:
    size, numbers = dtype.list_size, dtype.value_type.to_pandas_dtype()
    matrix = np.stack(rows).astype(numbers) if rows else np.zeros((0, size), numbers)
    if matrix.shape != (len(rows), size):
        raise CorpusError(f"rows of shape {matrix.shape[1:]} for a column of {size} numbers each")
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel(), dtype.value_type), type=dtype)


def failures_table(failures: Sequence[Failure]) -> pa.Table:
    names = [field.name for field in fields(Failure)]
    return pa.Table.from_pylist([{name: getattr(f, name) for name in names} for f in failures], schema=FAILURE_SCHEMA)


def failures_from_table(table: pa.Table) -> list[Failure]:
    return [Failure(**row) for row in table.to_pylist()]


def matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A fixed-size-list column as a (rows, size) array, without a Python loop."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dtype = column.type.value_type.to_pandas_dtype()
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros((0, column.type.list_size), dtype)


def matrices(column: pa.ChunkedArray | pa.Array) -> list[np.ndarray]:
    """A column of lists of fixed-size lists as one (n, size) array for each row."""
    return [matrix(row.values) for row in column]


def parquet_bytes(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    """A Parquet file with one row group; the same table and metadata give the same bytes.

    No dictionaries: floats do not repeat, and a dictionary of vectors would be tried and thrown away.
    """
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    table = table.replace_schema_metadata({METADATA_KEY: text.encode(), b"checksum": checksum.PARQUET_MARK})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        row_group_size=max(1, len(table)),
        write_statistics=False,
        write_page_checksum=True,  # a reader that checks them sees every flipped bit
    )
    return checksum.seal_parquet(sink.getvalue().to_pybytes())


def parquet_metadata(schema: pa.Schema) -> dict[str, Any]:
    """What `parquet_bytes` put beside the columns. Raises ValueError if the file is none of ours."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise CorpusError("it carries no lora_diffusion metadata: it is not a file of a corpus")
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise CorpusError("its lora_diffusion metadata is not a JSON object")
    return metadata
