"""Killed anywhere, the same command gives the same bytes: a short run of chaos.py, with the points where it must hold."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from chaos import Chaos, Tally, with_server

SEED = int(os.environ.get("SEED", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # `Chaos` sets it for what it starts
        with with_server(folder) as server:
            yield Chaos(folder, SEED, server)


def survived(tally: Tally) -> bool:
    return (tally.lost, tally.doubled, tally.different) == (0, 0, 0) and tally.kills > 0


@pytest.mark.parametrize("point", ["1 half", "2 after", "4 before", "10 after", "12 half", "19 half"])
def test_killed_between_two_writes(chaos: Chaos, point: str) -> None:
    """1: manifest, 2: plan, 3 to 9: shards, 10 to 12: the end; then the same of a second part of the plan."""
    chaos.between(point)
    tally = chaos.tallies["between two writes"]
    assert survived(tally), tally.log
    assert tally.kills == tally.rounds, "it died each time"


def test_killed_drivers_and_workers(chaos: Chaos) -> None:
    while chaos.tallies.get("local", Tally()).kills < 4:
        chaos.local()
    assert survived(chaos.tallies["local"]), chaos.tallies["local"].log


@pytest.mark.s3
def test_killed_drivers_workers_and_store_on_a_bad_network(chaos: Chaos) -> None:
    while chaos.tallies.get("s3", Tally()).kills < 1:
        chaos.s3()
    assert survived(chaos.tallies["s3"]), chaos.tallies["s3"].log


def test_a_full_disk_is_a_sentence_and_costs_nothing(chaos: Chaos) -> None:
    while chaos.tallies.get("full disk", Tally()).kills < 2:
        chaos.disk()
    assert survived(chaos.tallies["full disk"]), chaos.tallies["full disk"].log


def test_a_training_killed_after_a_checkpoint_goes_on_to_the_same_synthesiser(chaos: Chaos) -> None:
    while chaos.tallies.get("training", Tally()).kills < 1:
        chaos.training()
    tally = chaos.tallies["training"]
    assert survived(tally), tally.log
    assert all("vae.safetensors" in entry["checkpoints"] for entry in tally.log)


def test_what_a_kill_must_not_do_is_noticed(chaos: Chaos) -> None:
    """The comparison itself: a person that is gone, and a byte that differs."""
    from lora_diffusion.corpus import CorpusReader

    tally = chaos.tallies.setdefault("noticed", Tally(rounds=1))
    uri = chaos.folder / "noticed"
    chaos.run_in_peace(chaos.victims.corpus, str(uri))
    (uri / "shards" / "00004.parquet").unlink()
    assert len(CorpusReader(uri).shards) == 4
    chaos._compare("noticed", str(uri), chaos.calm)
    assert tally.lost > 0
    assert tally.different == 1
