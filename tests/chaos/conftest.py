"""`chaos`: rounds of kills, once for each file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from chaos import Chaos, with_server

SEED = int(os.environ.get("SEED", "0"))


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # `Chaos` sets it for what it starts
        with with_server(folder) as server:
            yield Chaos(folder, SEED, server)
