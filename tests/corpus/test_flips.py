"""A corpus in which one byte changed is noticed, wherever the byte lies."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_corpus import NAMES, build

from lora_diffusion.artifacts.checksum import PARQUET_MARK, check, check_parquet, seal, seal_parquet
from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.training.dataset import read_rows
from lora_diffusion.synthesis.training.snapshot import take_snapshot


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build(open_store(folder), NAMES)
    return folder


@pytest.mark.parametrize("name", ["shards/00001.parquet", "failures/00001.parquet", "plan/00000.parquet"])
def test_every_changed_byte_of_a_parquet_file_is_noticed(corpus: Path, name: str) -> None:
    whole, rng = (corpus / name).read_bytes(), np.random.default_rng(0)
    assert check_parquet(whole)
    for at in range(len(whole)):
        data = whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :]
        with contextlib.suppress(ValueError):
            assert not check_parquet(data), "it says that it is whole"
            pytest.fail(f"byte {at} of {len(whole)} hid that there is a checksum")


def test_every_changed_byte_of_statistics_is_noticed(corpus: Path) -> None:
    whole, rng = (corpus / "statistics.safetensors").read_bytes(), np.random.default_rng(0)
    for at in range(len(whole)):
        with pytest.raises(ValueError, match="no statistics of a corpus"):
            Statistics.from_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])


def test_files_of_earlier_releases_have_no_checksum_and_are_read(corpus: Path) -> None:
    from safetensors.numpy import load, save

    whole = (corpus / "statistics.safetensors").read_bytes()
    old = save(load(whole))
    assert check(whole)
    assert not check(old)
    assert seal(old) == whole
    np.testing.assert_array_equal(Statistics.from_bytes(old).M2, Statistics.from_bytes(whole).M2)


def test_a_sealed_parquet_file_is_one_for_everybody(corpus: Path, tmp_path: Path) -> None:
    """The bytes before the footer are skipped, and a program that writes the table anew leaves no half of a checksum."""
    path = tmp_path / "plain.parquet"
    table = CorpusReader(corpus).table(["identity"])
    pq.write_table(table, path)
    assert not check_parquet(path.read_bytes())
    path.write_bytes(seal_parquet(path.read_bytes()))
    assert pq.read_table(path).equals(table)
    assert path.read_bytes().count(PARQUET_MARK) == 1


def test_a_training_refuses_a_shard_with_a_changed_byte_wherever_it_lies(corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    shard, rng = folder / "shards/00001.parquet", np.random.default_rng(0)
    whole = shard.read_bytes()
    vectors = pq.ParquetFile(shard).metadata.row_group(0).column(pq.read_schema(shard).names.index("vector"))
    areas = (
        range(len(whole)),
        range(vectors.data_page_offset, vectors.data_page_offset + vectors.total_compressed_size),
    )
    for at in (int(rng.choice(area)) for _ in range(50) for area in areas):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"00001"):
            list(read_rows(take_snapshot(str(folder)), 1))
