"""The whole of jobs/world/train_recogniser.py at the smallest size: it ends, and a second run has nothing to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion.world.people import sample_person
from lora_diffusion.world.recognisers.data import HAIR_LATENTS, ShardSpec, load_people, render_shard, with_other_hair

pytestmark = pytest.mark.slow

JOB = Path(__file__).resolve().parents[2] / "jobs" / "world" / "train_recogniser.py"


def run(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    smallest = ["--people", "12", "--held-out", "12", "--views", "3", "--hair-views", "1", "--minutes", "0.02"]
    smallest += ["--detector-steps", "3", "--canvases", "2", "--workers", "1", "--threads", "1", "--no-bf16"]
    command = [sys.executable, str(JOB), "--work", str(work), *smallest, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env={**os.environ})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recogniser")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_leaves_folders_that_insightface_reads_and_their_figures(work: Path) -> None:
    for name in ("recogniser", "recogniser-b"):
        assert {p.name for p in (work / name).iterdir()} == {"det.onnx", "rec.onnx", "figures.json"}
        figures = json.loads((work / name / "figures.json").read_text())
        assert {"detector", "as_usual", "other_hair"} <= set(figures)
        assert figures["as_usual"]["people"] == 12
        assert 0 < figures["as_usual"]["auc"] < 1


def test_a_second_run_trains_and_renders_nothing(work: Path) -> None:
    made = [p for p in work.rglob("*") if p.suffix in (".npz", ".safetensors") or p.name == "rec.onnx"]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len(before) == 6 + 4 + 2  # shards; a network and a checkpoint of each recogniser; their ONNX files
    done = run(work, "--only", "render", "--only", "detector", "--only", "a", "--only", "b")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_wrong_numbers_are_refused_at_the_start(tmp_path: Path) -> None:
    done = run(tmp_path / "w", "--people", "5")
    assert done.returncode == 2
    assert "12 to 10000" in done.stderr
    assert not (tmp_path / "w").exists()


def test_other_hair_leaves_the_face_alone() -> None:
    person = sample_person(80_000)
    other = with_other_hair(person, 0)
    changed = {name for name in person.latents if person.latents[name] != other.latents[name]}
    assert changed == set(HAIR_LATENTS)
    assert with_other_hair(person, 0).latents == other.latents
    assert with_other_hair(person, 1).latents != other.latents


def test_a_shard_gives_its_people_in_order(tmp_path: Path) -> None:
    render_shard(ShardSpec(str(tmp_path), first=80_000, count=2, views=2))
    data = load_people(str(tmp_path), range(80_000, 80_002))
    assert data.photos.shape == (4, 64, 64, 3)
    assert list(data.person) == [0, 0, 1, 1]
    assert np.isfinite(data.points).all()
    with pytest.raises(FileNotFoundError):
        load_people(str(tmp_path), range(80_100, 80_101))
