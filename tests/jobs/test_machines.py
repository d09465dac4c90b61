"""Machines that join a cluster get work, and one that is about to be taken away costs a training nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from low_rank_corpus import write_corpus

from lora_diffusion.storage import open_store

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run(script: str, *words: str) -> str:
    """A process of its own, as a cluster of several nodes cannot stand beside the session's Ray."""
    command = [sys.executable, "-W", "ignore", str(SUPPORT / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("finetune_max", ["0", "2"], ids=["what the cluster has", "two GPUs"])
def test_a_machine_that_joins_in_the_middle_gets_work(finetune_max: str, tmp_path: Path) -> None:
    found = json.loads(run("join_a_node.py", str(tmp_path / "corpus"), finetune_max).splitlines()[-1])
    assert found["nodes"] == 2
    assert found["by_the_one_that_joined"] >= 2
    assert found["people"] == 640


def test_a_training_on_a_machine_that_is_drained_is_saved_and_goes_on_elsewhere(tmp_path: Path) -> None:
    write_corpus(open_store(tmp_path / "corpus"), 40)
    said = run("drain_a_node.py", str(tmp_path / "corpus"), str(tmp_path / "training"))
    assert "a node is drained: True" in said
    assert "a machine of this run is being taken away: the state is saved" in said
    assert "denoiser: goes on after step" in said
    assert (tmp_path / "training" / "synthesizer" / "config.json").exists()
