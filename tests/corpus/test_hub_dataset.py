"""A corpus as a dataset of the Hugging Face Hub: who may be in it, what its files are like, and that `datasets` reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_corpus
import yaml
from small_corpus import LAYOUT, MANIFEST, NAMES, build, make

from lora_diffusion.corpus import CorpusReader, hub
from lora_diffusion.corpus.forget import forget
from lora_diffusion.corpus.hub import HubDataset
from lora_diffusion.corpus.tombstone import make_key
from lora_diffusion.jobs.run import main
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import open_store

WITH_LORA = sorted(name for name in NAMES if name != "cy")


@pytest.fixture
def reader(tmp_path: Path) -> CorpusReader:
    make_key(open_store(tmp_path / "corpus"))
    return build(open_store(tmp_path / "corpus"), NAMES)


def identities(folder: Path) -> list[str]:
    return [
        name for file in sorted(folder.glob("data/*.parquet")) for name in pq.read_table(file)["identity"].to_pylist()
    ]


def header(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_datasets_reads_it_as_the_card_says_and_a_row_is_a_lora_again(
    reader: CorpusReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    place = tmp_path / "dataset"
    words = [str(tmp_path / "corpus"), f"output={place}", "format=hf"]
    assert main("export", [*words, "--dry-run"]) == 0
    assert not place.exists()
    assert main("export", words) == 0
    assert "8 people" in capsys.readouterr().out
    rows = datasets.load_dataset(str(place), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["identity"][:] == WITH_LORA
    np.testing.assert_array_equal(np.array(rows["vector"][:], np.float32), reader.vectors())
    said = header(place)
    declared = datasets.Features._from_yaml_list(said["dataset_info"]["features"])
    assert declared == rows.features
    assert set(declared) == set(hub.COLUMNS) - {"consent"}, "no hashes or embeddings of single photos"
    assert said["license"] == "other"
    assert said["size_categories"] == ["n<1K"]
    assert "Biometric data" in (place / "README.md").read_text()
    made_with = json.loads((place / "lora.json").read_text())
    assert LoRALayout.from_dict(made_with["layout"]) == LAYOUT
    assert made_with["base_model"] == "tiny-sd"
    (place / "README.md").write_text("mine")
    assert main("export", words) == 0
    assert (place / "README.md").read_text() == "mine"


def test_files_and_row_groups_are_small(reader: CorpusReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ROWS_OF_A_GROUP", 2)
    monkeypatch.setattr(hub, "FILE_BYTES", 15_000)
    HubDataset(reader).write(open_store(tmp_path / "dataset"))
    files = sorted((tmp_path / "dataset" / "data").iterdir())
    assert [file.name for file in files] == [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for file in files:
        metadata = pq.read_metadata(file)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2]
        assert metadata.row_group(0).column(0).has_offset_index, "the viewer seeks by it"
    assert identities(tmp_path / "dataset") == WITH_LORA


def test_who_was_forgotten_is_in_no_export_not_even_an_old_one(reader: CorpusReader, tmp_path: Path) -> None:
    place = tmp_path / "dataset"
    HubDataset(reader).write(open_store(place))
    shutil.copytree(tmp_path / "corpus" / "shards", tmp_path / "old")
    forget(open_store(tmp_path / "corpus"), "dee")
    HubDataset(CorpusReader(tmp_path / "corpus")).write(open_store(place))
    left = [name for name in WITH_LORA if name != "dee"]
    assert identities(place) == left
    shutil.copytree(tmp_path / "old", tmp_path / "corpus" / "shards", dirs_exist_ok=True)  # somebody restored a backup
    HubDataset(CorpusReader(tmp_path / "corpus")).write(open_store(place))
    assert identities(place) == left
    assert header(place)["dataset_info"]["splits"][0]["num_examples"] == len(left)


def test_consent_can_be_asked_for(reader: CorpusReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has consent in the corpus"):
        HubDataset(reader, require_consent=True)

    def consenting(shard):  # type: ignore[no-untyped-def]
        people, failures = make(shard)
        return [
            replace(p, consent="signed 2026-01-01" if p.identity in ("ana", "flo") else None) for p in people
        ], failures

    monkeypatch.setattr(small_corpus, "make", consenting)
    some = build(open_store(tmp_path / "some"), NAMES, manifest=replace(MANIFEST, consent=True))
    assert HubDataset(some).people == 8
    dataset = HubDataset(some, require_consent=True)
    dataset.write(open_store(tmp_path / "dataset"))
    assert dataset.people == 2
    assert identities(tmp_path / "dataset") == ["ana", "flo"]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    from lora_diffusion.corpus import open_corpus

    open_corpus(open_store(tmp_path), MANIFEST)
    with pytest.raises(ValueError, match="nobody in the corpus"):
        HubDataset(CorpusReader(tmp_path))
