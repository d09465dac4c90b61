"""runs/sd15.sh: what the whole way would cost, and what it asks for. test_wheel.py goes it, in the embedded world."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "runs" / "sd15.sh"


def run(*words: str, **env: str) -> str:
    done = subprocess.run([str(SCRIPT), *words], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_dry_run_says_seconds_hours_and_money_that_add_up() -> None:
    said = run("--dry-run", "--price", "2", "--picture-steps", "100", PEOPLE="1000", GPUS="4")
    rows = [line[16:].split() for line in said.splitlines() if " GPU-h" in line]
    seconds, hours, money = ([float(row[i].replace(",", "")) for row in rows] for i in (0, 2, 4))
    assert len(rows) == 7
    for column, rounded in ((seconds, 4), (hours, 0.04), (money, 0.04)):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=rounded)
    assert money[-1] == pytest.approx(2 * hours[-1], abs=0.02)
    assert 4 < hours[0] < 5, "1,000 LoRAs of 16 s"
    assert "estimate" in said
    assert "measured" in said


def test_without_photos_it_says_what_it_wants() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("PHOTOS", "HELD_OUT", "BASE", "SHAPE")}
    done = subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PHOTOS: the photos of the people to learn from" in done.stderr


@pytest.mark.parametrize("shape", ["sd15", "tiny"])
def test_settings_of_a_step_come_after_the_scripts_own(shape: str, tmp_path: Path) -> None:
    """Of two settings of a name the last one holds. No step is run."""
    given = {f"{step}_SET": f"{step}=1 a=2" for step in ("CORPUS", "TRAIN", "EVALUATE")}
    said = run(SHAPE=shape, PYTHON="true", OUT=str(tmp_path), PHOTOS="a", HELD_OUT="b", BASE="c", **given)
    assert [sum(line.endswith(" " + words) for line in said.splitlines()) for words in given.values()] == [2, 1, 1]
