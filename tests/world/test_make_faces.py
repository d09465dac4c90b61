"""Folders of synthetic people: `lora_diffusion/world/people/dataset.py` and `jobs/world/make_faces.py`."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, JpegImagePlugin

from lora_diffusion.storage import open_store
from lora_diffusion.world.people import render, sample_person, sample_view
from lora_diffusion.world.people.dataset import SCHEMA, FacesConfig, FacesFolder, FacesWriter

JOB = Path(__file__).parents[2] / "jobs" / "world" / "make_faces.py"
SMALL = FacesConfig(views=2, size=32)
PEOPLE = range(20_000, 20_003)


def make(uri: str, numbers: range = PEOPLE, config: FacesConfig = SMALL) -> None:
    folder = FacesFolder(uri, config)
    for number in folder.missing(numbers):
        FacesWriter(uri, config)({"numbers": [number]})
    folder.finish()


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people, made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    make(str(folder))
    return folder


@pytest.fixture(scope="module")
def job() -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location("make_faces", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_table_says_what_is_in_the_photos(whole: Path) -> None:
    table = pq.read_table(whole / "faces.parquet")
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [(row["number"], row["view"]) for row in rows] == [(n, v) for n in PEOPLE for v in (0, 1)]
    for row in rows:
        person, view = sample_person(row["number"]), sample_view(row["number"], row["view"])
        drawn = render(person, view, 32)
        with Image.open(whole / row["file"]) as photo:
            assert JpegImagePlugin.get_sampling(photo) == 0  # 4:4:4
            assert abs(np.asarray(photo).astype(int) - drawn.image).mean() < 4
        assert row["file"] == f"{row['identity']}/{row['view']:02d}.jpg"
        assert row["split"] == "corpus"
        assert np.allclose(row["landmarks"], drawn.landmarks.ravel())
        assert np.allclose(row["face_box"], drawn.face_box)
        assert view.expression in row["caption"]
        assert view.background == row["attributes"]["background"]
        assert ("glasses" in row["caption"]) >= row["attributes"]["glasses"]


def test_interrupted_and_repeated_gives_the_same_files(whole: Path, tmp_path: Path) -> None:
    folder = FacesFolder(str(tmp_path), SMALL)
    assert folder.missing(PEOPLE) == list(PEOPLE)
    FacesWriter(str(tmp_path), SMALL)({"numbers": [20_001]})
    # Killed while it wrote the next person: a photo cut short, a temporary file, no row.
    started = tmp_path / "person-020000"
    started.mkdir()
    (started / "00.jpg").write_bytes((whole / "person-020000" / "00.jpg").read_bytes()[:100])
    (started / ".01.jpg.0123456789ab.tmp").write_bytes(b"half")
    assert FacesFolder(str(tmp_path), SMALL).missing(PEOPLE) == [20_000, 20_002]
    make(str(tmp_path))
    assert content(tmp_path) == content(whole)

    # Killed between writing the table and removing the parts: their rows come twice.
    FacesWriter(str(tmp_path), SMALL)({"numbers": [20_002]})
    make(str(tmp_path))
    assert content(tmp_path) == content(whole)


def test_finished_folder_grows_by_people_and_by_views(whole: Path, tmp_path: Path) -> None:
    make(str(tmp_path), range(20_001, 20_002), FacesConfig(views=1, size=32))
    make(str(tmp_path))
    assert content(tmp_path) == content(whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make(str(tmp_path), range(20_001, 20_002))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # done is done


def test_photos_of_another_size_are_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"size 32, not 64; choose another folder"):
        FacesFolder(str(whole), FacesConfig(size=64)).missing(PEOPLE)


def test_job_can_be_submitted_to_ray() -> None:
    assert os.access(JOB, os.X_OK)
    assert JOB.read_text().startswith("#!/usr/bin/env python\n")


@pytest.mark.ray
def test_job_makes_what_the_library_makes(
    ray_local: None, job: Callable[[list[str]], None], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--people", "20000:20003", "--views", "2", "--size", "32", "--out", str(tmp_path)]
    job(command)
    assert content(tmp_path) == content(whole)
    assert "3/3 people" in capsys.readouterr().out
    job(command)
    assert "3 people, 3 of them done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="size 32, not 64"):
        job(["--people", "20000:20003", "--out", str(tmp_path)])


@pytest.mark.ray
@pytest.mark.s3
def test_job_writes_to_s3(bucket: str, ray_local: None, job: Callable[[list[str]], None], whole: Path) -> None:
    uri = f"s3://{bucket}/faces"
    job(["--people", "20000:20003", "--views", "2", "--size", "32", "--out", uri])
    store = open_store(uri)
    people = [name for name in store.folders() if not name.startswith(".")]  # some stores keep an empty .parts
    assert people == [f"person-{number:06d}" for number in PEOPLE]
    assert store.files(".parts") == {}
    assert store.read("faces.parquet") == (whole / "faces.parquet").read_bytes()
    with Image.open(io.BytesIO(store.read("person-020000/01.jpg"))) as photo:
        assert photo.size == (32, 32)


@pytest.mark.parametrize("people", ["20000", "5:5", "7:3", "a:b"])
def test_wrong_range_of_people_says_what_is_expected(
    job: Callable[[list[str]], None], people: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        job(["--people", people, "--out", "x"])
    assert "for example 20000:20040" in capsys.readouterr().err


def test_people_beyond_the_population_are_refused(job: Callable[[list[str]], None], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="person 90009 is in no split"):
        job(["--people", "89990:90010", "--out", str(tmp_path)])
