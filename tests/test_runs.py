"""runs/sd15.sh: the whole way by one command, in the embedded world; what it would cost; and that it goes on."""

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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_shape_goes_the_whole_way_and_a_second_time_does_nothing(tmp_path: Path) -> None:
    env = {"SHAPE": "tiny", "OUT": str(tmp_path), "PORT": "8932", "RAY_ADDRESS": "local"}
    said = run(**env)
    assert (tmp_path / "personalised/lora.safetensors").exists()
    assert (tmp_path / "evaluation/report.html").exists()
    assert "photo -> LoRA and picture in" in said
    made = [*(tmp_path / "corpus").rglob("*.parquet"), *(tmp_path / "training/checkpoints").glob("*")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert before
    run(**env, PHOTO="")
    assert {path: path.stat().st_mtime_ns for path in made} == before
