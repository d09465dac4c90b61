"""A corpus as training data: read shard by shard, checked, and cached on local disk, where each row is one seek away.

Training wants rows in random order, and every worker wants the same order whatever their number. Parquet in a bucket gives
neither, so each machine copies the vectors once into a flat file that is memory-mapped.

Axes: P rows (people), Q photos of all of them, F photos of one, N vector length, C embedding length (512).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.corpus.plan import CorpusError, shard_name
from lora_diffusion.corpus.reader import opened
from lora_diffusion.corpus.schema import EMBEDDING_SIZE, check_columns, matrices, matrix
from lora_diffusion.places import Place
from lora_diffusion.storage import Store, open_store, partial_folder
from lora_diffusion.synthesis.training.private import cache_root, private_files, private_folder
from lora_diffusion.synthesis.training.snapshot import MADE_ANEW, CorpusSnapshot, check_snapshot, take_snapshot
from lora_diffusion.training.distributed import Group
from lora_diffusion.training.meter import in_bytes

__all__ = [
    "CorpusRows",
    "CorpusSnapshot",
    "DataConfig",
    "RowCache",
    "check_snapshot",
    "fill_cache",
    "open_rows",
    "read_rows",
    "take_snapshot",
]

# Why a row is left out of training, by the number in the cache's `reason` column.
REASONS = ("", "nan_vector", "bad_embedding", "low_similarity", "over_max_people")
CACHE_VERSION = 2  # in the folder's name: a cache of another version is not looked at
MANY_PHOTOS = 20  # of one person, for the estimate of the cache's size
COLUMNS = ("identity", "similarity", "embedding", "photo_embeddings", "vector")


@dataclass(frozen=True)
class DataConfig:
    """Which rows of the corpus are learned from.

    `cache`: folder on every machine's own disk for the copy of the corpus, which stays there; empty: a new one in the
        system's temporary folder, which goes with the run. Only the user who runs it can read either.
    `min_similarity`: rows whose fine-tuned LoRA scores lower are left out; None keeps all.
    `max_people`: only so many rows, drawn evenly by name (for curves over the size of the corpus); None: all.
    """

    cache: Place = ""
    validation_fraction: float = 0.1  # of people, chosen by their names, who are not trained on
    min_similarity: float | None = None
    max_people: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, not be {self.validation_fraction}")
        if self.max_people is not None and self.max_people < 2:
            raise ValueError(f"max_people must be at least 2, not {self.max_people}: one row is for validation")


def read_rows(snapshot: CorpusSnapshot, index: int, store: Store | None = None) -> Iterator[pa.Table]:
    """The rows of one shard, a table for each row group: COLUMNS, `slot` (place in the cache) and `reason`.

    A corpus of format version 1 keeps the photos' mean only: it then counts as the embedding of a single photo.
    """
    store = store or open_store(snapshot.uri)
    slot = snapshot.starts[index]
    try:
        with opened(store, f"shards/{shard_name(index)}.parquet", whole=True) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                table = check_columns(parquet.read_row_group(group, columns=list(COLUMNS)))
                table = table.replace_schema_metadata(None)
                if lost := set(COLUMNS) - {"photo_embeddings"} - set(table.column_names):
                    raise CorpusError(f"shard {shard_name(index)} of {snapshot.uri} lacks the column {min(lost)}")
                if "photo_embeddings" not in table.column_names:
                    table = table.append_column("photo_embeddings", _in_lists(table["embedding"]))
                slots = pa.array(range(slot, slot + len(table)), pa.int64())
                slot += len(table)
                yield table.append_column("slot", slots).append_column("reason", pa.array(_reasons(table), pa.int8()))
    except CorpusError as error:
        raise ValueError(f"{str(error).rstrip('. ')}. {MADE_ANEW}") from error


def _in_lists(column: pa.ChunkedArray) -> pa.Array:
    rows = column.combine_chunks()
    return pa.ListArray.from_arrays(pa.array(range(len(rows) + 1), pa.int32()), rows)


def _reasons(table: pa.Table) -> np.ndarray:
    """(P,) int8 index into REASONS: what is wrong with a row whatever the settings."""
    finite = np.isfinite(matrix(table["vector"])).all(axis=1)
    reasons = np.zeros(len(table), np.int8)
    for row, (mean_C, photos_FC) in enumerate(
        zip(matrix(table["embedding"]), matrices(table["photo_embeddings"]), strict=True)
    ):
        norms = np.linalg.norm(np.vstack([mean_C, photos_FC]).astype(np.float64), axis=1)
        if len(photos_FC) == 0 or not (np.isfinite(norms) & (norms > 1e-6)).all():
            reasons[row] = REASONS.index("bad_embedding")
    reasons[~finite] = REASONS.index("nan_vector")
    return reasons


class RowCache:
    """The rows of a snapshot on this machine's disk: vectors as one flat file, the rest beside it.

    A process fills it in a folder of its own (`put` in any order, also from threads), and `finish` moves that into place: of several who
    fill the same, one is read by all.
    """

    def __init__(self, snapshot: CorpusSnapshot, root: str | Path) -> None:
        self.snapshot = snapshot
        self.folder = Path(root) / f"{snapshot.key}-{CACHE_VERSION}"
        self._filled: np.ndarray | None = None
        self._making = ExitStack()

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").exists()

    @property
    def num_bytes(self) -> int:
        per_value = np.dtype(self.snapshot.vector_dtype).itemsize
        return self.snapshot.num_rows * (self.snapshot.vector_size * per_value + (1 + MANY_PHOTOS) * EMBEDDING_SIZE * 4)

    def begin(self) -> None:
        """Make room in a new folder. Raises ValueError if the disk has too little."""
        self._making.close()
        if os.path.lexists(self.folder) and private_folder(self.folder) and not self.complete:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a release that filled it in its place
        self._partial = self._making.enter_context(partial_folder(self.folder))
        free = shutil.disk_usage(self._partial).free
        if free < self.num_bytes * 1.02:
            raise ValueError(
                f"the corpus needs {in_bytes(self.num_bytes)} on the disk of {self.folder}, which has {in_bytes(free)} "
                "free: set data.cache to a folder on a larger disk, or data.max_people"
            )
        rows = self.snapshot.num_rows
        self._vectors = self._map(self._partial, "w+")
        self._embeddings = np.zeros((rows, EMBEDDING_SIZE), np.float32)
        self._similarity = np.full(rows, np.nan, np.float32)
        self._reason, self._filled = np.zeros(rows, np.int8), np.zeros(rows, bool)
        self._identities: list[str] = [""] * rows
        self._photos: list[np.ndarray] = [np.empty((0, EMBEDDING_SIZE), np.float32)] * rows

    def put(self, table: pa.Table) -> None:
        """Rows as `read_rows` gives them, each into its slot."""
        assert self._filled is not None, "begin() first"
        slots = table["slot"].to_numpy()
        self._vectors[slots] = matrix(table["vector"])
        self._embeddings[slots] = matrix(table["embedding"])
        self._similarity[slots] = table["similarity"].to_numpy()
        self._reason[slots] = table["reason"].to_numpy()
        photos = matrices(table["photo_embeddings"])
        for slot, identity, photos_FC in zip(slots, table["identity"].to_pylist(), photos, strict=True):
            self._identities[slot], self._photos[slot] = identity, photos_FC
        self._filled[slots] = True

    def finish(self) -> None:
        """Commit. Raises ValueError if rows are missing."""
        assert self._filled is not None, "begin() first"
        if not self._filled.all():
            raise ValueError(
                f"{(~self._filled).sum()} of {len(self._filled)} rows of {self.snapshot.uri} did not arrive"
            )
        self._vectors.flush()
        for name in ("embeddings", "similarity", "reason"):
            np.save(self._partial / f"{name}.npy", getattr(self, f"_{name}"))
        np.save(self._partial / "photos.npy", np.concatenate(self._photos))
        np.save(self._partial / "photo_counts.npy", np.array([len(photos_FC) for photos_FC in self._photos]))
        (self._partial / "identities.json").write_text(json.dumps(self._identities))
        (self._partial / "complete.json").write_text(json.dumps(self.snapshot.to_dict()))
        try:
            self._partial.rename(self.folder)
        except OSError:
            if not self.complete:  # else another process was faster, with the same rows
                raise
        self._making.close()

    def open(self, config: DataConfig) -> CorpusRows:
        if not self.complete:
            raise RuntimeError(f"the rows of {self.snapshot.uri} in {self.folder} are not complete")
        private_folder(self.folder)
        arrays = {
            name: np.load(self.folder / f"{name}.npy", allow_pickle=False)
            for name in ("embeddings", "photos", "photo_counts", "similarity", "reason")
        }
        identities = json.loads((self.folder / "identities.json").read_text())
        return CorpusRows(self._map(self.folder, "r"), identities=identities, config=config, **arrays)

    def _map(self, folder: Path, mode: Any) -> np.memmap[Any, Any]:
        shape = (self.snapshot.num_rows, self.snapshot.vector_size)
        return np.memmap(folder / "vectors.bin", np.dtype(self.snapshot.vector_dtype), mode, shape=shape)


def open_rows(snapshot: CorpusSnapshot, config: DataConfig, group: Group | None = None) -> CorpusRows:
    """The rows of `snapshot`, copied to this machine's disk if `config.cache` doesn't hold them yet. Raises ValueError."""
    with cache_root(config.cache, group) as root:
        cache = RowCache(snapshot, root)
        fill_cache(cache, group)
        return cache.open(config)


def fill_cache(cache: RowCache, group: Group | None = None, threads: int = 4) -> None:
    """Fill from the corpus by threads, each with a row group in memory; nothing to do if it is filled already.

    `group`: the first worker of each machine fills, the others wait. Raises ValueError on all of them if one cannot.
    """
    group = group or Group()
    error: Exception | None = None
    if group.local_rank == 0 and not cache.complete:
        try:
            with private_files():
                _fill(cache, threads)
        except Exception as caught:
            error = caught
    group.agree(error)


def _fill(cache: RowCache, threads: int) -> None:
    cache.begin()
    store = open_store(cache.snapshot.uri)

    def copy(index: int) -> None:
        for table in read_rows(cache.snapshot, index, store):
            cache.put(table)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(copy, cache.snapshot.shards):
            pass
    cache.finish()


class CorpusRows:
    """The usable rows, split into `train` and `validation`: slots in ascending order.

    A row's side of the split depends on its identity's name alone, so it keeps it when the corpus grows.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        embeddings: np.ndarray,
        photos: np.ndarray,
        photo_counts: np.ndarray,
        similarity: np.ndarray,
        reason: np.ndarray,
        identities: Sequence[str],
        config: DataConfig,
    ) -> None:
        """`photos` (Q, C): embeddings of the first row's photos, then the second's; how many each has: `photo_counts`."""
        self.vectors_PN, self.embeddings_PC = vectors, embeddings
        self.photos_QC, self.photo_counts_P = photos, photo_counts
        self.photo_starts_P = np.cumsum(photo_counts) - photo_counts
        self.identities = list(identities)
        reason = reason.copy()
        if config.min_similarity is not None:
            low = ~(similarity >= config.min_similarity)  # NaN is low
            reason[low & (reason == 0)] = REASONS.index("low_similarity")
        draws = np.array([_draw(identity) for identity in self.identities])
        usable = np.flatnonzero(reason == 0)
        if config.max_people is not None and len(usable) > config.max_people:
            order = np.argsort(draws[usable, 1], kind="stable")
            reason[usable[order[config.max_people :]]] = REASONS.index("over_max_people")
            usable = np.flatnonzero(reason == 0)
        self.left_out = {name: int((reason == i).sum()) for i, name in enumerate(REASONS) if i and (reason == i).any()}
        held = draws[usable, 0] < config.validation_fraction
        if len(usable) >= 2 and (held.all() or not held.any()):  # a handful of rows: still one on each side
            held = np.arange(len(usable)) == np.argmin(draws[usable, 0])
        self.train, self.validation = usable[~held], usable[held]
        if len(self.train) == 0 or len(self.validation) == 0:
            raise ValueError(
                f"{len(usable)} of {len(reason)} rows can be used (left out: {self.left_out}); training needs at least 2. "
                "Look at the corpus' failures, or lower data.min_similarity"
            )

    def vectors(self, slots: np.ndarray) -> Tensor:
        """(len(slots), N) float32."""
        return torch.from_numpy(np.asarray(self.vectors_PN[slots], np.float32))

    def embeddings(self, slots: np.ndarray) -> Tensor:
        """(len(slots), C) float32, unit norm."""
        rows = torch.from_numpy(self.embeddings_PC[slots])
        return rows / rows.norm(dim=1, keepdim=True)

    def photo_embeddings(self, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of each photo: (B, F, C) float32, unit norm, F of who has most; (B,) photos of each, the rest are zeros."""
        counts_B = self.photo_counts_P[slots]
        photos_BFC = np.zeros((len(slots), counts_B.max(initial=0), self.photos_QC.shape[1]), np.float32)
        for row, slot, count in zip(photos_BFC, slots, counts_B, strict=True):
            row[:count] = self.photos_QC[self.photo_starts_P[slot] :][:count]
        return F.normalize(torch.from_numpy(photos_BFC), dim=-1), torch.from_numpy(counts_B)

    def chunks(self, slots: np.ndarray, size: int = 256) -> Iterator[Tensor]:
        """Vectors of `slots` in their order, at most `size` rows at a time."""
        for start in range(0, len(slots), size):
            yield self.vectors(slots[start : start + size])


def _draw(identity: str) -> tuple[float, float]:
    """Two numbers in [0, 1) that depend on the name alone: for the split, and for the order of `max_people`."""
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64
