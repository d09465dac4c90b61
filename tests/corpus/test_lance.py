"""A corpus as a Lance table: rows come by number and by face, and those who left the corpus leave the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_corpus import LAYOUT, NAMES, build
from test_hub_dataset import WITH_LORA

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.corpus.forget import forget
from lora_diffusion.corpus.tombstone import make_key
from lora_diffusion.jobs.run import main
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import open_store


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_key(open_store(tmp_path / "corpus"))
    build(open_store(tmp_path / "corpus"), NAMES)
    return tmp_path / "corpus"


def test_rows_come_by_number_and_people_by_their_face(corpus: Path, tmp_path: Path) -> None:
    import lance  # here: whoever forks should not have it

    place = tmp_path / "people.lance"
    words = [str(corpus), f"output={place}", "format=lance"]
    assert main("export", [*words, "--dry-run"]) == 0
    assert not place.exists()
    assert main("export", words) == 0
    table, reader = lance.dataset(place), CorpusReader(corpus)
    assert table.to_table(["identity"])["identity"].to_pylist() == WITH_LORA
    row = table.take([3]).to_pylist()[0]
    np.testing.assert_array_equal(np.array(row["vector"], np.float32), reader.vectors()[3])
    found = table.to_table(["identity"], nearest={"column": "embedding", "q": row["embedding"], "k": 1})
    assert found["identity"].to_pylist() == [row["identity"]]
    made_with = json.loads(table.schema.metadata[b"lora"])
    assert LoRALayout.from_dict(made_with["layout"]) == LAYOUT
    assert made_with["base_model"] == "tiny-sd"


def test_who_was_forgotten_is_in_no_version_of_the_table(corpus: Path, tmp_path: Path) -> None:
    import lance

    place = tmp_path / "people.lance"
    for _ in range(2):
        assert main("export", [str(corpus), f"output={place}", "format=lance"]) == 0
        forget(open_store(corpus), "dee")
    table = lance.dataset(place)
    assert table.to_table(["identity"])["identity"].to_pylist() == [name for name in WITH_LORA if name != "dee"]
    assert len(table.versions()) == 1
    assert len(list(place.glob("data/*"))) == 1, "the file with her row is gone, not only out of the listing"


@pytest.mark.s3
def test_a_table_in_a_bucket(corpus: Path, bucket: str) -> None:
    import lance

    assert main("export", [str(corpus), f"output=s3://{bucket}/people.lance", "format=lance"]) == 0
    options = {"allow_http": "true", "aws_region": "us-east-1"}
    assert lance.dataset(f"s3://{bucket}/people.lance", storage_options=options).count_rows() == len(WITH_LORA)
