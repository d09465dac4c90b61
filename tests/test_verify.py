"""`lora-diffusion verify`: what is wrong with a corpus or a synthesiser is named, never a traceback; what can be made again is removed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_corpus import MANIFEST, NAMES, build, make
from synthesis_world import untrained

from lora_diffusion.cli import main
from lora_diffusion.corpus import CorpusReader, ShardWriter
from lora_diffusion.storage import open_store
from lora_diffusion.verify import examine, repair

OF_THE_JOB = ("corpus.json", "plan", "shards", "failures", "statistics", "statistics.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    build(open_store(folder), NAMES)
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def found(place: Path) -> dict[str, str]:
    return {finding.name: finding.kind for finding in examine(str(place))}


def test_a_whole_corpus_is_whole_also_while_it_grows_or_of_an_earlier_release(corpus: Path) -> None:
    assert found(corpus) == {}
    (corpus / "shards/00001.parquet").unlink()
    assert found(corpus) == {"shards/00001.parquet": "missing"}
    values = json.loads((corpus / "corpus.json").read_text())
    values = {
        key: value for key, value in values.items() if key not in ("checksum", "sha256")
    }  # as of an earlier release
    (corpus / "corpus.json").write_text(json.dumps({**values, "state": "building"}))
    assert found(corpus) == {}


def test_300_of_300_changed_bytes_are_noticed_and_named_wherever_they_lie(corpus: Path) -> None:
    files = [p for name in OF_THE_JOB for p in sorted([corpus / name, *(corpus / name).glob("*")]) if p.is_file()]
    sizes, rng = np.array([path.stat().st_size for path in files]), np.random.default_rng(0)
    for i in range(300):
        path = files[rng.integers(len(files)) if i % 2 else rng.choice(len(files), p=sizes / sizes.sum())]
        whole = path.read_bytes()
        at = int(rng.integers(len(whole)))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        name = str(path.relative_to(corpus))
        assert found(corpus).get(name) == "damaged", f"byte {at} of {name}"
        path.write_bytes(whole)


def test_what_is_missing_foreign_or_of_another_recipe_is_named(corpus: Path) -> None:
    other = replace(MANIFEST, recipe={**MANIFEST.recipe, "finetune": {"steps": 81, "seed": 0}})
    shard = CorpusReader(corpus).plan.shards[2]
    ShardWriter(open_store(corpus), other).commit(shard, *make(shard))
    shutil.copy(corpus / "shards/00000.parquet", corpus / "shards/00000 (1).parquet")
    shutil.copy(corpus / "shards/00000.parquet", corpus / "shards/00007.parquet")
    (corpus / ".DS_Store").write_bytes(b"")
    (corpus / "statistics/00001.safetensors").unlink()
    os.mkfifo(corpus / "pipe.parquet")
    (corpus / "shards/old").mkdir()
    (corpus / "notes").mkdir()
    assert found(corpus) == {
        ".DS_Store": "foreign",
        "notes/": "foreign",
        "shards/old/": "foreign",
        "shards/00000 (1).parquet": "foreign",
        "shards/00007.parquet": "foreign",
        "shards/00002.parquet": "other recipe",
        "statistics/00001.safetensors": "missing",
    }


def test_a_shard_in_anothers_place_is_damage(corpus: Path) -> None:
    shutil.copy(corpus / "shards/00000.parquet", corpus / "shards/00001.parquet")
    assert found(corpus)["shards/00001.parquet"] == "damaged"


@pytest.mark.parametrize("cut", [0, 20, -9])
def test_repair_removes_what_the_job_makes_again_and_nothing_else(corpus: Path, made: Path, cut: int) -> None:
    for name in ("shards/00001.parquet", "statistics/00000.safetensors", "statistics.safetensors"):
        (corpus / name).write_bytes((corpus / name).read_bytes()[:cut])
    (corpus / "shards/mine.txt").write_text("mine")
    removed = repair(str(corpus), examine(str(corpus)))
    assert removed == ["statistics/00000.safetensors", "shards/00001.parquet", "statistics.safetensors"]
    assert (corpus / "shards/mine.txt").read_text() == "mine"
    (corpus / "shards/mine.txt").unlink()


def test_a_damaged_plan_or_manifest_is_never_removed(corpus: Path) -> None:
    for name in ("plan/00000.parquet", "corpus.json"):
        (corpus / name).write_bytes((corpus / name).read_bytes()[:-3])
        findings = list(examine(str(corpus)))
        assert [(f.kind, f.name) for f in findings] == [("damaged", name)]
        assert "from a copy" in findings[0].what
        assert repair(str(corpus), findings) == []


def test_nothing_is_removed_under_a_job_that_is_at_work(corpus: Path) -> None:
    for name in ("claim.json", "claim-0123456789abcdef.json"):
        (corpus / name).write_text("{}")
    assert list(examine(str(corpus))) == []
    (corpus / "shards/00001.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="a job is at work"):
        repair(str(corpus), examine(str(corpus)))


def test_a_synthesiser_is_read_whole(tmp_path: Path) -> None:
    untrained("pca").save_pretrained(tmp_path)
    assert found(tmp_path) == {}
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for at in rng.integers(len(whole), size=25):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
            assert found(tmp_path).get(path.name) in ("damaged", "missing"), f"byte {at} of {path.name}"
        path.write_bytes(whole)
    (tmp_path / "codes.safetensors").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert found(tmp_path) == {"codes.safetensors": "missing", "notes.txt": "foreign"}


def test_the_shipped_synthesiser_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "tiny"])
    assert capsys.readouterr().out == "tiny is whole\n"


def test_the_command_says_what_it_found_and_fails(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "shards/00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(corpus), "--repair"])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("damaged: shards/00001.parquet: Parquet file size is 4 bytes")
    assert lines[1:] == [
        "removed: shards/00001.parquet",
        "Run the command that made this place again: it makes what was removed",
    ]
    with pytest.raises(SystemExit, match="holds no corpus, training run or synthesiser"):
        main(["verify", str(corpus / "plan")])


@pytest.mark.s3
def test_a_corpus_in_a_bucket_is_looked_at_and_repaired_as_well(bucket: str) -> None:
    place = f"s3://{bucket}/corpus"
    store = open_store(place)
    build(store, NAMES)
    assert list(examine(place)) == []
    whole = bytearray(store.read("shards/00001.parquet"))
    whole[len(whole) // 2] ^= 1
    store.write("shards/00001.parquet", bytes(whole))
    store.write("shards/mine.txt", b"mine")
    found = list(examine(place))
    assert {finding.name: finding.kind for finding in found} == {
        "shards/00001.parquet": "damaged",
        "shards/mine.txt": "foreign",
    }
    assert repair(place, found) == ["shards/00001.parquet"]
    store.delete("shards/mine.txt")
    build(store, NAMES)
    assert list(examine(place)) == []
