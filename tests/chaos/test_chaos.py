"""Killed anywhere, the same command gives the same bytes: a short run of chaos.py, with the points where it must hold."""

from __future__ import annotations

import subprocess

import clock
import pytest
from chaos import Chaos
from s3_server import BUCKET
from tally import Tally, survived

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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
    chaos.compare("noticed", str(uri), chaos.calm)
    assert tally.lost > 0
    assert tally.different == 1


@pytest.mark.skipif(not clock.CC, reason="the clock is moved by a library that a C compiler makes")
def test_clocks_that_jump_by_a_day_take_over_nothing_and_lose_nothing(chaos: Chaos) -> None:
    chaos.clock()
    assert survived(chaos.tallies["clock"]), chaos.tallies["clock"].log


@pytest.mark.s3
@pytest.mark.skipif(not clock.CC, reason="the clock is moved by a library that a C compiler makes")
@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_clock_that_the_store_refuses_is_a_sentence(chaos: Chaos, seconds: int) -> None:
    uri = f"s3://{BUCKET}/skewed{seconds}"
    with clock.jumping(chaos, (seconds,)) as env:
        refused = subprocess.run(clock.command(uri), env=env, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "this machine's clock is not the store's (" in refused.stderr.splitlines()[-1]
    assert refused.stderr.endswith("Set it, and run the same command again\n")
