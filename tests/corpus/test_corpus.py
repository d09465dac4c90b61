"""Laws of the corpus format: each person once, killed anywhere and still whole, readable by everyone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lora_diffusion.corpus import (
    CorpusConflict,
    CorpusReader,
    Failure,
    Manifest,
    Person,
    Plan,
    ShardPlan,
    ShardWriter,
    Statistics,
    extend_plan,
    finish_corpus,
    matrix,
    open_corpus,
)
from lora_diffusion.corpus.schema import METADATA_KEY, parquet_metadata
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store, open_store

LAYOUT = LoRALayout.from_shapes(
    {"a.to_q": (5, 4), "a.to_v": (6, 4)}, rank=1, alpha=1.0, target_modules=("to_q", "to_v")
)
RECIPE = {"groups": {"people_per_group": 2, "groups_per_shard": 2}, "finetune": {"steps": 80, "seed": 0}}
MANIFEST = Manifest(LAYOUT.to_dict(), {"name": "tiny-sd", "fingerprint": "0123456789abcdef"}, RECIPE)
NAMES = ["ana", "../x", "a/b", "Zoë 😀", "bo", "cy", "dee", "ed", "flo"]


def make(shard: ShardPlan) -> tuple[list[Person], list[Failure]]:
    """The people of a shard; `cy` has no face, and one photo of `bo` was left out."""
    people, failures = [], []
    for position, identity in zip(shard.positions, shard.identities, strict=True):
        if identity == "cy":
            failures.append(Failure(position, identity, None, "embed", "no_face", "no photo shows a face"))
            continue
        if identity == "bo":
            failures.append(Failure(position, identity, "2.jpg", "read", "truncated", "the file ends early"))
        rng = np.random.default_rng(position)
        people.append(
            Person(
                position=position,
                identity=identity,
                vector=rng.normal(1.0, 0.1, LAYOUT.size).astype(np.float32),
                embedding=rng.normal(size=512).astype(np.float32),
                photo_embeddings=rng.normal(size=(3, 512)).astype(np.float32),
                similarity=0.5,
                base_similarity=0.1,
                photo_similarity=float("nan"),
                loss=0.2,
                steps=80,
                seed=0,
                num_photos=2,
                num_photos_dropped=0,
                photo_sha256=("ab", "cd"),
                embed_seconds=0.1,
                finetune_seconds=1.0,
                score_seconds=0.2,
            )
        )
    return people, failures


def build(store: Store, names: list[str], dtype: str = "float32", order: int = 1) -> CorpusReader:
    """The whole job, without the work: begin or continue, commit what is missing, finish."""
    manifest = open_corpus(store, MANIFEST)
    reader = CorpusReader(store)
    plan = extend_plan(store, reader.plan, names)
    infos, _ = reader.verify(plan.shards)
    writer = ShardWriter(store, manifest, dtype)
    for shard in plan.shards[::order]:
        if shard.index not in {info.index for info in infos}:
            writer.commit(shard, *make(shard))
    infos, problems = CorpusReader(store).verify()
    assert not problems
    finish_corpus(store, manifest, infos)
    return CorpusReader(store)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "corpus")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/corpus")


def test_everyone_is_in_the_corpus_once(store: Store) -> None:
    reader = build(store, NAMES)
    assert reader.identities == sorted(set(NAMES) - {"cy"})
    assert len(reader) == len(NAMES) - 1
    assert [(f.identity, f.photo, f.reason) for f in reader.failures()] == [
        ("bo", "2.jpg", "truncated"),
        ("cy", None, "no_face"),
    ]
    assert reader.manifest.state == "complete"
    assert reader.manifest.counts == {
        "num_shards": 3,
        "num_people": 8,
        "num_failed": 1,
        "failed_by_reason": {"no_face": 1},
        "photos_dropped_by_reason": {"truncated": 1},
    }
    assert reader.layout == LAYOUT
    assert reader.vectors().shape == (8, LAYOUT.size)
    assert reader.embeddings().shape == (8, 512)
    made = {person.identity: person for shard in reader.plan.shards for person in make(shard)[0]}
    photos = reader.table(["photo_embeddings"])["photo_embeddings"].to_pylist()
    for identity, found in zip(reader.identities, photos, strict=True):
        np.testing.assert_array_equal(np.array(found, np.float32), made[identity].photo_embeddings)
    vectors = reader.vectors()
    assert reader.statistics().count == 8
    np.testing.assert_allclose(reader.statistics().mean, vectors.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(reader.statistics().std, vectors.astype(np.float64).std(0), rtol=1e-12)


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


class DyingStore(Store):
    """A store whose process dies at its n-th write, before it (`whole` false) or right after it."""

    def __init__(self, store: Store, writes: int, whole: bool) -> None:
        super().__init__(store.uri, store.filesystem, store.root, store.local)
        self._left, self._whole = writes, whole

    def write(self, name: str, data: bytes) -> None:
        self._left -= 1
        if self._left < 0:
            if self._whole:
                super().write(name, data)
            raise Killed
        super().write(name, data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_between_any_two_writes_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    build(open_store(tmp_path / "calm"), NAMES)
    calm = contents(tmp_path / "calm")
    deaths = 0
    for writes in range(14):
        for whole in (False, True):
            folder = tmp_path / f"{writes}{whole}"
            try:
                build(DyingStore(open_store(folder), writes, whole), NAMES)
            except Killed:
                deaths += 1
            build(open_store(folder), NAMES)
            assert contents(folder) == calm
    assert deaths >= 20, "the corpus takes more writes than were tried to die at"


def test_the_order_in_which_shards_finish_does_not_matter(tmp_path: Path) -> None:
    build(open_store(tmp_path / "forward"), NAMES)
    build(open_store(tmp_path / "backward"), NAMES, order=-1)
    assert contents(tmp_path / "forward") == contents(tmp_path / "backward")


def test_a_second_run_does_nothing_again(store: Store) -> None:
    build(store, NAMES)
    writes = DyingStore(store, 2, whole=False)  # the counts are written again, no shard is
    assert len(build(writes, NAMES)) == 8


def test_new_people_are_appended_and_nobody_moves(store: Store) -> None:
    before = build(store, NAMES)
    identities, vectors = before.identities, before.vectors()
    after = build(store, [*NAMES, "aaa", "zed"])
    assert after.identities == [*identities, "aaa", "zed"]
    np.testing.assert_array_equal(after.vectors()[:8], vectors)
    assert after.statistics().count == 10
    assert build(store, ["aaa"]).identities == after.identities, "people whose photos have gone stay"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"name": "other", "fingerprint": "f" * 16}}, "base.fingerprint: '0123456789abcdef' there, 'ffff"),
        ({"recipe": {**RECIPE, "finetune": {"steps": 90, "seed": 0}}}, "finetune.steps: 80 there, 90 now"),
        ({"layout": replace(LAYOUT, alpha=2.0).to_dict()}, "layout_id: "),
    ],
)
def test_another_base_layout_or_recipe_in_the_same_place_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    store = open_store(tmp_path)
    build(store, NAMES)
    before = contents(tmp_path)
    with pytest.raises(CorpusConflict, match=f"{message}(.|\n)*Choose another output"):
        open_corpus(store, replace(MANIFEST, **change))
    assert contents(tmp_path) == before


def test_what_does_not_decide_bits_may_change(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    build(store, NAMES)
    assert open_corpus(store, replace(MANIFEST, config={"workers": 3}, versions={})).config == {}


@pytest.mark.parametrize("damage", ["cut", "emptied", "statistics gone", "failures gone", "swapped"])
def test_a_damaged_shard_is_found_and_made_again(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    build(store, NAMES)
    calm = contents(tmp_path)
    shard = tmp_path / "shards/00001.parquet"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "emptied":
        shard.write_bytes(b"")
    elif damage == "statistics gone":
        (tmp_path / "statistics/00001.safetensors").unlink()
    elif damage == "failures gone":
        (tmp_path / "failures/00001.parquet").unlink()
    else:
        shard.write_bytes((tmp_path / "shards/00000.parquet").read_bytes())
    infos, problems = CorpusReader(store).verify()
    assert [info.index for info in infos] == [0, 2]
    assert list(problems) == [1]
    build(store, NAMES)
    assert contents(tmp_path) == calm


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


def test_no_corpus_and_a_foreign_version_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no corpus at .* Make one with jobs/build_corpus.py"):
        CorpusReader(tmp_path)
    open_store(tmp_path).write_json("corpus.json", {**MANIFEST.to_dict(), "format_version": 99})
    with pytest.raises(ValueError, match="format version 99"):
        CorpusReader(tmp_path)


def test_merged_statistics_equal_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(1e3, 1e-2, (100, 7)).astype(np.float32)
    parts = [Statistics.of(part) for part in (rows[:1], rows[1:1], rows[1:64], rows[64:])]
    merged = Statistics.merged(parts, 7)
    whole = rows.astype(np.float64)
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.std, whole.std(0), rtol=1e-9)
    again = Statistics.from_bytes(merged.to_bytes())
    np.testing.assert_array_equal(again.M2, merged.M2)
    assert np.array_equal(Statistics.merged([], 7).std, np.zeros(7))


def test_groups_and_shards_follow_from_positions() -> None:
    plan = Plan((("a", "b", "c", "d", "e"), ("0",)), people_per_group=2, groups_per_shard=2)
    assert [shard.identities for shard in plan.shards] == [("a", "b", "c", "d"), ("e",), ("0",)]
    assert [list(shard.positions) for shard in plan.shards] == [[0, 1, 2, 3], [4], [5]]
    assert [plan.shards[0].group_of(position) for position in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        Plan((), 0, 1)
