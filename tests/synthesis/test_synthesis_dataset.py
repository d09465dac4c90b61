"""Laws of training data: each usable row once, on the same side of the split for ever, whatever the store."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from low_rank_corpus import LAYOUT, RECIPE, write_corpus

from lora_diffusion.corpus import CorpusConflict, CorpusReader
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.training.dataset import CorpusRows, DataConfig, RowCache, fill_cache, open_rows, read_rows
from lora_diffusion.synthesis.training.private import cache_root, private_folder
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot, check_snapshot, take_snapshot


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "corpus")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/corpus")


def rows_of(uri: str, folder: Path, config: DataConfig | None = None) -> CorpusRows:
    return open_rows(take_snapshot(uri), replace(config or DataConfig(), cache=str(folder)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cache_holds_the_corpus(store: Store, tmp_path: Path, dtype: str) -> None:
    reader = write_corpus(store, 20, dtype=dtype)
    rows = rows_of(store.uri, tmp_path / "cache")
    everyone = np.sort(np.concatenate([rows.train, rows.validation]))
    assert everyone.tolist() == list(range(20))
    assert rows.identities == reader.identities
    np.testing.assert_array_equal(rows.vectors(everyone).numpy(), reader.vectors().astype(np.float32))
    np.testing.assert_allclose(rows.embeddings(everyone).numpy(), reader.embeddings(), atol=1e-6)
    photos = [np.array(row, np.float32) for row in reader.table(["photo_embeddings"])["photo_embeddings"].to_pylist()]
    slots = np.array([7, 2, 3])
    found_BFC, counts_B = rows.photo_embeddings(slots)
    assert found_BFC.shape == (3, 3, 512)
    assert counts_B.tolist() == [len(photos[slot]) for slot in slots] == [3, 2, 3]
    for found_FC, count, slot in zip(found_BFC.numpy(), counts_B, slots, strict=True):
        np.testing.assert_allclose(found_FC[:count], photos[slot], atol=1e-6)
        assert not found_FC[count:].any()


def test_of_an_old_corpus_the_mean_counts_as_the_only_photo(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 16)
    for path in (tmp_path / "corpus" / "shards").iterdir():
        table = pq.read_table(path)
        kept = {key: value for key, value in table.schema.metadata.items() if key != b"checksum"}
        pq.write_table(table.drop_columns(["photo_embeddings"]).replace_schema_metadata(kept), path)
    manifest = store.read_json("corpus.json")
    store.write_json("corpus.json", {**manifest, "format_version": 1})
    rows = rows_of(store.uri, tmp_path / "cache")
    photos_BFC, counts_B = rows.photo_embeddings(rows.train)
    assert counts_B.tolist() == [1] * len(rows.train)
    np.testing.assert_allclose(photos_BFC[:, 0].numpy(), rows.embeddings(rows.train).numpy(), atol=1e-6)
    with pytest.raises(CorpusConflict, match="format_version: 1 there, 2 now"):
        write_corpus(store, 24)


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 24, bad={2: "nan", 9: "zero", 10: "nan", 11: "photo", 20: "failed"})
    snapshot = take_snapshot(store.uri)
    assert (snapshot.num_rows, snapshot.num_failed) == (23, 1)
    rows = rows_of(store.uri, tmp_path / "cache", DataConfig(min_similarity=0.3))
    low = sum(similarity < 0.3 for similarity in CorpusReader(store).table(["similarity"])["similarity"].to_pylist())
    assert rows.left_out["nan_vector"] == 2
    assert rows.left_out["bad_embedding"] == 2
    assert 0 < rows.left_out["low_similarity"] <= low
    used = np.concatenate([rows.train, rows.validation])
    assert np.isfinite(rows.vectors(used).numpy()).all()
    assert len(used) + sum(rows.left_out.values()) == snapshot.num_rows


def test_nobody_changes_sides_when_the_corpus_grows(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 48)
    small = rows_of(store.uri, tmp_path / "cache")
    write_corpus(store, 96)
    large = rows_of(store.uri, tmp_path / "cache")
    held = {large.identities[i] for i in large.validation}
    assert {small.identities[i] for i in small.validation} == held & set(small.identities)
    assert 2 <= len(held) <= 20


def test_max_people_is_a_subset_that_grows(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 64)
    chosen = []
    for count in (8, 16, 32, None):
        rows = rows_of(store.uri, tmp_path / "cache", DataConfig(max_people=count))
        chosen.append({rows.identities[i] for i in [*rows.train, *rows.validation]})
    assert [len(names) for names in chosen] == [8, 16, 32, 64]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


def test_a_run_keeps_its_snapshot_of_a_growing_corpus(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 16, finish=False)
    snapshot = take_snapshot(store.uri)
    write_corpus(store, 32)
    again = CorpusSnapshot.from_dict(snapshot.to_dict())
    assert again == snapshot
    check_snapshot(again)
    assert sum(len(table) for index in again.shards for table in read_rows(again, index)) == 16
    assert take_snapshot(store.uri).key != again.key


def test_an_unfinished_cache_is_filled_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 16)
    cache = RowCache(take_snapshot(store.uri), str(tmp_path / "cache"))
    cache.begin()
    cache.put(next(read_rows(cache.snapshot, 0)))
    with pytest.raises(ValueError, match=r"8 of 16 rows .* did not arrive"):
        cache.finish()
    assert not cache.complete
    fill_cache(cache)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    fill_cache(cache)
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == before


def test_two_processes_that_fill_the_same_cache_both_read_the_rows(tmp_path: Path) -> None:
    """The second emptied the folder that the first was filling: it trained on zeros."""
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 16)
    one, other = (RowCache(take_snapshot(store.uri), str(tmp_path / "cache")) for _ in range(2))
    tables = [table for index in one.snapshot.shards for table in read_rows(one.snapshot, index)]
    one.begin()
    one.put(tables[0])
    other.begin()
    for cache in (one, other):
        for table in tables:
            cache.put(table)
        cache.finish()
        rows = cache.open(DataConfig())
        slots = np.arange(16)
        assert np.array_equal(rows.vectors(slots).numpy(), CorpusReader(store).vectors().astype(np.float32))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [one.folder.name]


def test_what_is_wrong_with_a_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no corpus at"):
        take_snapshot(str(tmp_path / "nowhere"))
    one = open_store(tmp_path / "one")
    write_corpus(one, 1)
    with pytest.raises(ValueError, match="has 1 people with a LoRA; training needs at least 2"):
        take_snapshot(one.uri)
    store = open_store(tmp_path / "corpus")
    write_corpus(store, 24)
    snapshot = take_snapshot(store.uri)
    shard = tmp_path / "corpus" / "shards" / "00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shards/00001.parquet cannot be read: .*build_corpus.py command again"):
        take_snapshot(store.uri)
    with pytest.raises(ValueError, match=r"shard 00001 of .* has \d+ bytes, not \d+"):
        check_snapshot(snapshot)
    with pytest.raises(ValueError, match=r"shards/00001.parquet cannot be read"):
        list(read_rows(snapshot, 1))
    shard.unlink()
    with pytest.raises(ValueError, match=r"complete with 3 shards, but 2 are there \(missing: 00001\)"):
        take_snapshot(store.uri)
    other = LAYOUT.from_shapes({"a.to_q": (20, 16)}, rank=1, alpha=1.0, target_modules=("to_q",))
    write_corpus(open_store(tmp_path / "other"), 16, layout=other)
    shard.write_bytes((tmp_path / "other" / "shards" / "00001.parquet").read_bytes())
    with pytest.raises(ValueError, match="two corpora were mixed"):
        take_snapshot(store.uri)
    write_corpus(open_store(tmp_path / "recipe"), 24, recipe={**RECIPE, "finetune": {"steps": 90, "seed": 0}})
    for foreign in (tmp_path / "recipe" / "shards" / "00001.parquet", shard.with_name("00000.parquet")):
        shard.write_bytes(foreign.read_bytes())
        with pytest.raises(
            ValueError, match=r"shard 00001 of .* is shard \d made with recipe .*: it makes such shards anew"
        ):
            take_snapshot(store.uri)
    rows = write_corpus(open_store(tmp_path / "bad"), 4, bad={0: "nan", 1: "nan", 2: "nan"})
    with pytest.raises(ValueError, match="1 of 4 rows can be used"):
        rows_of(rows.store.uri, tmp_path / "cache")


def test_the_copy_on_a_machine_is_private_and_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    root = tmp_path / "tmp" / f"lora-diffusion-{os.getuid()}"
    reader = write_corpus(open_store(tmp_path / "corpus"), 16)
    snapshot = take_snapshot(reader.store.uri)
    rows = open_rows(snapshot, DataConfig())
    assert list(root.iterdir()) == []
    np.testing.assert_array_equal(rows.vectors(np.arange(16)).numpy(), reader.vectors())  # mapped, so still there

    (root / "of-a-killed-run").mkdir()
    with cache_root("") as one, cache_root("") as other:
        assert set(root.iterdir()) == {one, other}
        cache = RowCache(snapshot, one)
        fill_cache(cache)
        made = [root, one, cache.folder, *cache.folder.iterdir()]
        modes = {path.stat().st_mode & 0o777 for path in made}
        assert (len(made), modes) == (11, {0o700, 0o600})
    assert list(root.iterdir()) == []

    kept = DataConfig(cache=str(tmp_path / "kept"))
    open_rows(snapshot, kept)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "kept").iterdir()] == [0o700]


def test_a_folder_that_somebody_else_put_there_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"link is a link, not a folder of user \d+: set data.cache"):
        private_folder(tmp_path / "link")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ValueError, match=r"is user \d+'s, not a folder of user 12345"):
            private_folder(tmp_path / "elsewhere")
