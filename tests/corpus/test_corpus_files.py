"""Reading a corpus: with plain tools, and where files are foreign, edited or damaged."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from small_corpus import LAYOUT, MANIFEST, NAMES, build

from lora_diffusion.corpus import (
    CorpusError,
    CorpusReader,
    matrix,
    open_corpus,
)
from lora_diffusion.corpus.card import MARK
from lora_diffusion.corpus.schema import METADATA_KEY, parquet_metadata
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import StoreError, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(open_store(tmp_path), NAMES)
    return tmp_path


def test_plain_pyarrow_pandas_and_duckdb_read_it(folder: Path) -> None:
    expected = CorpusReader(folder).vectors()
    table = pq.read_table(folder / "shards")
    assert table["identity"].to_pylist()[:3] == ["../x", "Zoë 😀", "a/b"]
    np.testing.assert_array_equal(np.stack(table["vector"].to_pylist()).astype(np.float32), expected)
    frame = pd.read_parquet(folder / "shards")
    np.testing.assert_array_equal(np.stack(frame["vector"]), expected)
    rows = duckdb.sql(f"select identity, vector from '{folder}/shards/*.parquet' order by position").fetchall()
    np.testing.assert_array_equal(np.array([row[1] for row in rows], np.float32), expected)
    failed = duckdb.sql(f"select identity, reason from '{folder}/failures/*.parquet' where photo is null").fetchall()
    assert failed == [("cy", "no_face")]


def test_float16_vectors_are_read_by_all_and_their_statistics_are_of_what_is_stored(tmp_path: Path) -> None:
    reader = build(open_store(tmp_path), NAMES, "float16")
    vectors = reader.vectors()
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(reader.statistics().mean, vectors.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_array_equal(np.stack(pd.read_parquet(tmp_path / "shards")["vector"]), vectors)
    rows = duckdb.sql(f"select vector from '{tmp_path}/shards/*.parquet' order by position").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in rows], np.float16), vectors)


def test_each_file_says_what_it_was_made_with(folder: Path) -> None:
    schema = pq.read_schema(folder / "shards/00000.parquet")
    assert METADATA_KEY in schema.metadata
    metadata = parquet_metadata(schema)
    assert LoRALayout.from_dict(metadata["layout"]) == LAYOUT
    assert metadata["layout_id"] == LAYOUT.layout_id
    assert metadata["base"]["fingerprint"] == "0123456789abcdef"
    assert metadata["versions"].keys() >= {"python", "torch", "lora_diffusion"}
    assert {"config", "recipe_id"} <= metadata.keys()


def test_a_sample_is_spread_over_the_corpus(folder: Path) -> None:
    reader = CorpusReader(folder)
    table = reader.sample(3, ["identity", "vector"])
    assert table["identity"].to_pylist() == [reader.identities[row] for row in (0, 4, 7)]
    np.testing.assert_array_equal(matrix(table["vector"]), reader.vectors()[[0, 4, 7]])
    assert len(reader.sample(100, ["identity"])) == 8


def test_files_that_are_not_ours_are_left_alone_and_named_once(folder: Path) -> None:
    calm = CorpusReader(folder).identities
    strangers = ["plan/.DS_Store", "shards/._00000.parquet", "shards/00000 (1).parquet", "shards/٠٠٠٠٠.parquet"]
    strangers += ["shards/00000.parquet.part", "shards/0.parquet", "shards/000001.parquet", "plan/notes.txt"]
    for name in strangers:
        (folder / name).write_bytes(b"\0\5\26\7 not ours")
    (folder / "shards/00017.parquet").write_bytes((folder / "shards/00000.parquet").read_bytes())
    with warnings.catch_warnings(record=True, action="always") as warned:
        reader = CorpusReader(folder)
        assert reader.verify()[1] == {}
        assert reader.identities == calm
    assert len(warned) == 2
    text = "".join(str(warning.message) for warning in warned)
    assert all(repr(name.partition("/")[2]) in text for name in [*strangers, "shards/00017.parquet"])
    with warnings.catch_warnings(action="ignore"):
        assert build(reader.store, NAMES).identities == calm
    assert all((folder / name).read_bytes() == b"\0\5\26\7 not ours" for name in strangers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a list, expected an object"),
        ("3", "holds a int"),
        ("{}", "format None"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "JSON"),
        ('{"format": "lora-diffusion-corpus", "format_version": 2}', "layout, base, recipe"),
        ({"recipe": {}}, "recipe names no groups"),
        ({"base": {}}, "base has no fingerprint"),
        ({"layout": {**LAYOUT.to_dict(), "modules": [3]}}, "layout was edited by hand or cut"),
        ({"layout": {**LAYOUT.to_dict(), "rank": 2}}, "its content is"),
    ],
)
def test_a_manifest_that_is_none_is_one_sentence_with_its_place(folder: Path, text: str | dict, message: str) -> None:
    whole = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(text if isinstance(text, str) else json.dumps({**whole, **text}))
    for reading in (lambda: CorpusReader(folder), lambda: open_corpus(open_store(folder), MANIFEST)):
        with pytest.raises((ValueError, StoreError), match=message) as raised:
            reading()
        assert f"{folder}/corpus.json" in str(raised.value)


def test_a_damaged_file_is_named_and_nothing_else_is_raised(folder: Path) -> None:
    rng = np.random.default_rng(0)
    readings = (
        lambda reader: reader.vectors(),
        lambda reader: reader.failures(),
        lambda reader: reader.sample(3, ["vector"]),
        lambda reader: len(reader),
    )
    for name in ("plan/00000.parquet", "shards/00001.parquet", "failures/00001.parquet", "statistics.safetensors"):
        whole = (folder / name).read_bytes()
        for _ in range(30):
            data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.2 else whole)
            for at in rng.integers(len(data), size=3) if data else ():
                data[at] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(data)
            for reading in (*readings, CorpusReader.verify, CorpusReader.statistics):
                with contextlib.suppress(ValueError):
                    reading(CorpusReader(folder))
        (folder / name).write_bytes(b"")
        with pytest.raises(CorpusError, match=re.escape(f"{folder}/{name} cannot be read")):
            [reading(CorpusReader(folder)) for reading in (*readings, CorpusReader.statistics)]
        (folder / name).write_bytes(whole)
    (folder / "plan/00000.parquet").rename(folder / "plan/00001.parquet")
    with pytest.raises(CorpusError, match=r"plan has parts \[1\]: one is missing"):
        _ = CorpusReader(folder).plan


def test_a_flipped_bit_of_a_vector_is_noticed(folder: Path) -> None:
    shard = folder / "shards/00001.parquet"
    whole, calm, noticed, rng = shard.read_bytes(), CorpusReader(folder).vectors(), 0, np.random.default_rng(0)
    column = pq.ParquetFile(shard).metadata.row_group(0).column(pq.read_schema(shard).names.index("vector"))
    for _ in range(50):
        data = bytearray(whole)
        at = column.data_page_offset + int(rng.integers(column.total_compressed_size))
        data[at] ^= 1 << rng.integers(8)
        shard.write_bytes(data)
        try:
            np.testing.assert_array_equal(CorpusReader(folder).vectors(), calm)  # the page's header has spare bits
        except CorpusError:
            noticed += 1
    assert noticed >= 45


# --- a folder that can be uploaded as it is


@pytest.mark.parametrize(
    ("name", "column", "holds", "message"),
    [
        ("plan/00000.parquet", "identity", pa.binary(), "its column identity holds binary, not text"),
        ("shards/00000.parquet", "identity", None, r"its column identity is empty for 1 of \d+ rows"),
        (
            "shards/00000.parquet",
            "vector",
            pa.list_(pa.float32()),
            "vector holds lists of numbers, not rows of numbers",
        ),
        ("shards/00000.parquet", "num_photos", pa.string(), "num_photos holds text, not whole numbers"),
        ("failures/00001.parquet", "reason", pa.binary(), "reason holds binary, not text"),
    ],
)
def test_a_column_that_another_program_rewrote_is_named(
    folder: Path, name: str, column: str, holds: pa.DataType | None, message: str
) -> None:
    """Half of these end in a TypeError or AttributeError where they are used. holds None: nothing for one row."""
    table = pq.read_table(folder / name)
    values = table[column].to_pylist()
    rewritten = pa.array([None, *values[1:]] if holds is None else table[column].cast(holds).to_pylist(), holds)
    table = table.set_column(table.column_names.index(column), column, rewritten)
    pq.write_table(table, folder / name)
    reader = CorpusReader(folder)
    with pytest.raises(CorpusError, match=message):
        _ = reader.plan, reader.table(), reader.failures()


def test_a_shard_with_large_types_is_read_as_before(folder: Path) -> None:
    """As polars writes text and lists."""
    before, path = CorpusReader(folder).shard_vectors(1), folder / "shards/00001.parquet"
    table = pq.read_table(path)
    hashes = table.column_names.index("photo_sha256")
    table = table.set_column(hashes, "photo_sha256", table["photo_sha256"].cast(pa.large_list(pa.large_string())))
    table = table.set_column(1, "identity", table["identity"].cast(pa.large_string()))
    pq.write_table(table, path)
    reader = CorpusReader(folder)
    np.testing.assert_array_equal(reader.shard_vectors(1), before)
    assert reader.verify()[1] == {}


def test_a_column_that_is_gone_is_named(folder: Path) -> None:
    path = folder / "shards/00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["embedding"]), path)
    with pytest.raises(CorpusError, match=r"shards/00001.parquet cannot be read: it has no column embedding"):
        CorpusReader(folder).embeddings()


def test_the_card_names_the_data_files(folder: Path) -> None:
    import datasets

    card = DatasetCard.load(folder / "README.md")
    assert [config["config_name"] for config in card.data.to_dict()["configs"]] == ["people", "failures"]
    assert "8 people" in card.text
    assert "1 no_face" in card.text
    (folder / "shards/._00000.parquet").write_bytes(b"\0\5\26\7")
    (folder / "shards/00000 (1).parquet").write_bytes(b"\0\5\26\7")
    reader = CorpusReader(folder)
    with warnings.catch_warnings(action="ignore"):
        identities, vectors = reader.identities, reader.vectors()
    cache = {"cache_dir": str(folder / "cache"), "split": "train"}
    people = datasets.load_dataset(str(folder), **cache)
    assert people["identity"][:] == identities
    np.testing.assert_array_equal(np.array(people["vector"][:], np.float32), vectors)
    assert datasets.load_dataset(str(folder), "failures", **cache)["reason"][:] == ["truncated", "no_face"]


def test_the_card_of_a_corpus_without_failures_names_none_and_follows_the_corpus(tmp_path: Path) -> None:
    build(open_store(tmp_path), ["ana", "ed"])
    assert "failures/[" not in (tmp_path / "README.md").read_text()
    build(open_store(tmp_path), ["ana", "ed", "cy"])
    assert "failures/[" in (tmp_path / "README.md").read_text()
    mine = (tmp_path / "README.md").read_text().replace(MARK, "").replace("license: other", "license: cc0-1.0")
    (tmp_path / "README.md").write_text(mine)
    build(open_store(tmp_path), ["ana", "ed", "cy", "zoe"])
    assert (tmp_path / "README.md").read_text() == mine, "the user's own"
