"""Too little memory for a group: it is made in halves, by itself, and comes out the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit on a process' memory")
def test_who_does_not_fit_together_is_made_in_halves_and_the_loras_are_the_same(world: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "little_memory.py"
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, world], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["together"] in (1, 2, 4), found
    assert found["far"] < 1e-5
    assert f"does not hold people_per_group=8 together: {found['together']} at a time from here on" in found["told"]
    assert "the memory does not hold the fine-tuning of one person: finetune.gradient_checkpointing" in found["refused"]
