"""Any bytes become a value or a ValueError: some hundred cases of each reader. `python -m tests.fuzz` runs millions."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hostile import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate

HOSTILE = Path(__file__).parent / "hostile"
SLOW = {"shard": 5, "failures": 5, "manifest": 10, "shard_statistics": 3, "plan": 20}  # cases; of others 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reader -> a folder as it needs it, made when first asked for."""
    return {name: tmp_path_factory.mktemp(name) for name in READERS}


def read(name: str, folder: Path, data: bytes) -> None:
    with warnings.catch_warnings(action="ignore"), suppress(ValueError):
        (READERS[name].whole or READERS[name].read)(folder, data)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_a_value_or_a_sentence(name: str, folders: dict[str, Path]) -> None:
    reader, folder = READERS[name], folders[name]
    reader.prepare(folder)
    seeds = reader.seeds(folder)

    @settings(max_examples=SLOW.get(name, 100), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def any_bytes(seed: int) -> None:
        random = Random(seed)
        read(name, folder, mutate(random, random.choice(seeds), reader.change))

    any_bytes()
    for case in HOSTILE.glob(f"{name}-*"):  # those that broke it once
        read(name, folder, case.read_bytes())
