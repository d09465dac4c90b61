"""The files of a corpus, and what a training notes of it: each read by what reads it, and now and then with all the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from functools import cache, partial
from pathlib import Path

from mutations import Reader, plain, put
from small_corpus import LAYOUT, NAMES, build

from lora_diffusion import verify
from lora_diffusion.artifacts import checksum
from lora_diffusion.corpus import CorpusReader, Manifest
from lora_diffusion.corpus.reader import read_statistics
from lora_diffusion.corpus.schema import matrices
from lora_diffusion.corpus.tombstone import is_tombstone
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.training.dataset import read_rows
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot, take_snapshot
from lora_diffusion.verify import examine


@cache
def _whole_corpus(folder: Path) -> tuple[CorpusReader, CorpusSnapshot]:
    """As it was before one of its files is damaged, with its plan in memory."""
    return CorpusReader(folder), take_snapshot(str(folder))


def _of_corpus(name: str, look: Callable[[Path], Iterator[Callable[[], object]]]) -> Reader:
    """One file of a corpus. `look`: what reads it, each for itself."""

    def prepare(folder: Path) -> None:
        build(open_store(folder), NAMES)
        _ = _whole_corpus(folder)[0].plan.shards

    def read(folder: Path, data: bytes) -> None:
        put(folder, name, data)
        for step in look(folder):
            with suppress(ValueError):
                step()

    def whole(folder: Path, data: bytes) -> None:
        read(folder, data)
        for step in (_vectors, CorpusReader.failures, CorpusReader.verify, CorpusReader.statistics, _trained_on):
            with suppress(ValueError):
                step(CorpusReader(folder))
        list(examine(str(folder)))

    change = "json" if name.endswith(".json") else "safetensors" if name.endswith(".safetensors") else "bytes"

    def seeds(folder: Path) -> list[bytes]:
        data = (folder / name).read_bytes()
        return [data, *plain(data, change)]

    return Reader(seeds, read, prepare, change, whole)


def _look_at_shard(folder: Path) -> Iterator[Callable[[], object]]:
    reader, snapshot = _whole_corpus(folder)
    yield lambda: reader._verify_one(reader.plan.shards[1], {"00001.safetensors": 0})
    yield lambda: matrices(reader._table(1, ["photo_embeddings"])["photo_embeddings"])
    yield lambda: list(read_rows(snapshot, 1, reader.store))


def _look_at_failures(folder: Path) -> Iterator[Callable[[], object]]:
    reader, _ = _whole_corpus(folder)
    yield lambda: reader._failures(1, {"num_failure_rows": 2})
    yield lambda: verify._try("failures/00001.parquet", partial(verify._table, reader.store))


def _look_at_plan(folder: Path) -> Iterator[Callable[[], object]]:
    reader = copy(_whole_corpus(folder)[0])
    del reader.__dict__["plan"]
    yield lambda: (
        reader.plan.shards,
        reader.plan.new_part(["dee", "new"]),
        set(filter(is_tombstone, reader.plan.identities)),
    )
    yield lambda: verify._try("plan/00000.parquet", partial(verify._table, reader.store))


def _look_at_manifest(folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: _ids(CorpusReader(folder).manifest)
    yield lambda: verify._try("corpus.json", lambda name: checksum.check_json(open_store(folder).read_json(name)))


def _ids(manifest: Manifest) -> None:
    _ = manifest.identity, manifest.recipe_id, manifest.to_dict(), manifest.recipe_differences(manifest)


def _look_at_shard_statistics(folder: Path) -> Iterator[Callable[[], object]]:
    reader, _ = _whole_corpus(folder)
    yield lambda: read_statistics(reader.store, ["statistics/00000.safetensors"], LAYOUT.size)
    yield lambda: reader._is_whole("statistics/00000.safetensors", 1000)


def _vectors(reader: CorpusReader) -> None:
    reader.vectors()
    reader.sample(2, ["identity"])
    len(reader)


def _trained_on(reader: CorpusReader) -> None:
    snapshot = take_snapshot(reader.store.uri)
    for index in snapshot.shards:
        list(read_rows(snapshot, index))


def _snapshot(folder: Path) -> list[bytes]:
    build(open_store(folder / "corpus"), NAMES)
    return [json.dumps(take_snapshot(str(folder / "corpus")).to_dict()).encode()]


def _read_snapshot(folder: Path, data: bytes) -> None:
    snapshot = CorpusSnapshot.from_dict(open_store(put(folder, "data.json", data).parent).read_json("data.json"))
    _ = snapshot.key, snapshot.identity, snapshot.num_rows


OF_A_CORPUS = {
    "shard": _of_corpus("shards/00001.parquet", _look_at_shard),
    "failures": _of_corpus("failures/00001.parquet", _look_at_failures),
    "plan": _of_corpus("plan/00000.parquet", _look_at_plan),
    "manifest": _of_corpus("corpus.json", _look_at_manifest),
    "shard_statistics": _of_corpus("statistics/00000.safetensors", _look_at_shard_statistics),
    "snapshot": Reader(_snapshot, _read_snapshot, change="json"),
}
