"""Laws of the corpus format: each person once, killed anywhere and still whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import LAYOUT, MANIFEST, NAMES, OTHER, RECIPE, build, make

from lora_diffusion.corpus import (
    CorpusConflict,
    CorpusReader,
    Plan,
    ShardWriter,
    Statistics,
    finish_corpus,
    open_corpus,
)
from lora_diffusion.storage import Store, open_store


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


DAMAGES = ["cut", "emptied", "statistics gone", "statistics cut", "failures gone", "swapped", "another recipe"]


@pytest.mark.parametrize("damage", DAMAGES)
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
    elif damage == "statistics cut":
        (tmp_path / "statistics/00001.safetensors").write_bytes(calm["statistics/00001.safetensors"][:-1])
    elif damage == "another recipe":
        build(open_store(tmp_path / "other"), NAMES, manifest=OTHER)
        shutil.move(tmp_path / "other/shards/00001.parquet", shard)
        shutil.rmtree(tmp_path / "other")
        with pytest.raises(ValueError, match=r"shards/00001.parquet .*was made with recipe .* Run its .* again"):
            CorpusReader(store).vectors()
    elif damage == "failures gone":
        (tmp_path / "failures/00001.parquet").unlink()
    else:
        shard.write_bytes((tmp_path / "shards/00000.parquet").read_bytes())
    infos, problems = CorpusReader(store).verify()
    assert [info.index for info in infos] == [0, 2]
    assert list(problems) == [1]
    build(store, NAMES)
    assert contents(tmp_path) == calm


def test_statistics_are_restored_from_the_vectors_and_nobody_is_made_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = build(store, NAMES).manifest
    calm = contents(tmp_path)
    infos, _ = CorpusReader(store).verify()
    (tmp_path / "statistics/00000.safetensors").unlink()
    (tmp_path / "statistics/00001.safetensors").write_bytes(calm["statistics/00001.safetensors"][:-1])
    (tmp_path / "statistics/00002.safetensors").write_bytes(calm["statistics/00001.safetensors"])  # of another shard
    (tmp_path / "statistics.safetensors").write_bytes(calm["statistics.safetensors"][:-1])
    assert not CorpusReader(store).has_whole_statistics()
    finish_corpus(store, manifest, infos)
    assert contents(tmp_path) == calm
    assert CorpusReader(store).has_whole_statistics()


@pytest.mark.parametrize("lost", ["plan/00000.parquet", "plan/00001.parquet"])
def test_a_lost_part_of_the_plan_is_named_and_nothing_is_planned_or_made_anew(tmp_path: Path, lost: str) -> None:
    store = open_store(tmp_path)
    for names in ([*NAMES, "zed"], [*NAMES, "zed", "aaa"]):
        build(store, names)
    (tmp_path / lost).unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"/plan .* Restore it from a copy"):
        build(store, [*NAMES, "aaa", "new"])
    assert contents(tmp_path) == before


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


# --- what protects data holds whatever Python's switches, and names what it refuses


COMMIT = """
import sys
from small_corpus import MANIFEST, NAMES, make
from lora_diffusion.corpus import CorpusError, CorpusReader, ShardWriter, extend_plan, finish_corpus, open_corpus
from lora_diffusion.storage import open_store

assert False, "asserts are on"
store = open_store(sys.argv[1])
manifest = open_corpus(store, MANIFEST)
shards = extend_plan(store, CorpusReader(store).plan, NAMES).shards
writer = ShardWriter(store, manifest)
(first, failed), second = make(shards[0]), make(shards[1])
for people, failures in ([], []), (first[1:], failed), ([*first, first[0]], failed), (first, second[1]), second:
    try:
        writer.commit(shards[0], people, failures)
    except CorpusError:
        continue
    sys.exit(f"committed {people}")
writer.commit(shards[1], *second)
try:
    finish_corpus(store, manifest, CorpusReader(store).verify()[0])
except CorpusError:
    print("all refused")
"""


def test_a_shard_that_is_not_what_was_planned_is_never_committed_even_without_asserts(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # or torch is compiled anew for -O each time
    done = subprocess.run([sys.executable, "-O", "-c", COMMIT, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.stdout == "all refused\n", done.stderr
    assert [path.name for path in tmp_path.glob("shards/*")] == ["00001.parquet"]
    assert not (tmp_path / "statistics.safetensors").exists()


def test_a_shard_made_again_without_failures_leaves_none_of_before(tmp_path: Path) -> None:
    """Plain readers take all of failures/; and people lie in the order of their positions, however they are given."""
    store = open_store(tmp_path)
    shard = build(store, NAMES).plan.shards[1]
    people, _ = make(shard)
    cy = replace(people[0], position=shard.start + shard.identities.index("cy"), identity="cy")
    ShardWriter(store, MANIFEST).commit(shard, [*people, cy], [])
    assert not store.exists(f"failures/{shard.name}.parquet")
    assert CorpusReader(store).identities == sorted(NAMES)


def test_a_shard_itself_is_the_last_of_its_files_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It commits the others: killed before, nothing is half there; killed after, nobody is fine-tuned again."""
    written, write = list[str](), Store.write

    def noting(store: Store, name: str, data: bytes) -> None:
        written.append(name)
        write(store, name, data)

    monkeypatch.setattr(Store, "write", noting)
    build(open_store(tmp_path), NAMES)
    files = [name for name in written if "/00001." in name]
    assert files == ["failures/00001.parquet", "statistics/00001.safetensors", "shards/00001.parquet"]


def test_a_row_that_was_lost_or_doubled_is_noticed(tmp_path: Path) -> None:
    """Also the failure of a photo, whose person has a LoRA, and a row that another program wrote twice."""
    build(open_store(tmp_path), NAMES)
    lost, doubled = tmp_path / "failures/00001.parquet", tmp_path / "shards/00002.parquet"
    table = pq.read_table(lost)
    pq.write_table(table.filter(table["photo"].is_null()), lost)
    table = pq.read_table(doubled)
    pq.write_table(pa.concat_tables([table, table]), doubled)
    infos, problems = CorpusReader(tmp_path).verify()
    assert [info.index for info in infos] == [0]
    assert "not those that were committed with it" in problems[1]
    assert "holds 2 people and 0 failed, not the planned ones" in problems[2]


def test_a_shard_in_the_place_of_another_is_not_read(tmp_path: Path) -> None:
    """Its people would be there twice, and others not."""
    build(open_store(tmp_path), NAMES)
    shutil.copy(tmp_path / "shards/00000.parquet", tmp_path / "shards/00001.parquet")
    for read in (CorpusReader.vectors, CorpusReader.__len__):
        with pytest.raises(ValueError, match=r"shards/00001\.parquet .*shard 0 of another place"):
            read(CorpusReader(tmp_path))
