"""Laws of jobs/build_corpus.py on a real Ray: run it twice, kill it anywhere, feed it anything; each person is there once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from drivers import driver
from factory_world import PEOPLE, settings
from PIL import Image
from s3_faults import faulty
from s3_server import S3Server

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.jobs import corpus
from lora_diffusion.jobs.run import main
from lora_diffusion.storage import open_store

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "build_corpus.py"
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def job(ray_local: None) -> ModuleType:
    return corpus


@pytest.fixture(scope="module")
def config(world: Path) -> str:
    path = world / "config.yaml"
    values = {**settings(world), "people": str(world / "mixed"), "output": "nowhere"}
    path.write_text(yaml.safe_dump(values))
    add_bad_people(world)
    return str(path)


def add_bad_people(world: Path) -> None:
    """`mixed/`: the eight people, one without a face, one empty folder, and one bad photo."""
    shutil.copytree(world / "people", world / "mixed")
    for name in ("a wall", "Zoë 😀"):
        (world / "mixed" / name).mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 + i, 120, 150)).save(world / "mixed" / "a wall" / f"{i}.png")
    whole = (world / "mixed" / "person-020003" / "00.jpg").read_bytes()
    (world / "mixed" / "person-020003" / "cut.jpg").write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def calm_folder(job: ModuleType, config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calm") / "corpus"
    assert main("corpus", ["--config", config, f"output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def calm(calm_folder: Path) -> dict[str, Any]:
    """What an uninterrupted run gives."""
    return outcome(calm_folder)


def outcome(place: str | Path) -> dict[str, Any]:
    """Everything of a corpus that must not depend on what happened while it was made."""
    reader = CorpusReader(place)
    infos, problems = reader.verify()
    assert not problems
    assert len(infos) == len(reader.plan.shards)
    table = reader.table()
    rows = table.drop_columns([name for name in table.column_names if name.endswith("_seconds")]).to_pylist()
    failures = reader.failures()
    everybody = [row["identity"] for row in rows] + [f.identity for f in failures if f.photo is None]
    assert sorted(everybody) == sorted(reader.plan.identities), "each person exactly once"
    return {
        "rows": str(rows),  # NaN equals itself in text
        "vectors": reader.vectors().tobytes(),
        "embeddings": reader.embeddings().tobytes(),
        "statistics": reader.store.read("statistics.safetensors"),
        "failures": failures,
        "counts": reader.manifest.counts,
        "state": reader.manifest.state,
    }


def shards(output: str | Path) -> int:
    return len(open_store(output).files("shards"))


def test_everyone_is_in_shards_or_failures_once(calm: dict[str, Any]) -> None:
    assert calm["state"] == "complete"
    assert calm["counts"] == {
        "num_shards": 5,
        "num_people": len(PEOPLE),
        "num_failed": 2,
        "failed_by_reason": {"no_photos": 1, "too_few_photos": 1},
        "photos_dropped_by_reason": {"no_face": 2, "truncated": 1},
    }
    assert [(f.identity, f.photo, f.reason) for f in calm["failures"]] == [
        ("Zoë 😀", None, "no_photos"),
        ("a wall", None, "too_few_photos"),
        ("a wall", "0.png", "no_face"),
        ("a wall", "1.png", "no_face"),
        ("person-020003", "cut.jpg", "truncated"),
    ]


def test_a_second_run_does_nothing_and_new_people_are_appended(
    job: ModuleType, config: str, world: Path, tmp_path: Path, calm: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "mixed", tmp_path / "people")
    for name in ("person-020001", "person-020005"):
        shutil.move(tmp_path / "people" / name, tmp_path / name)
    words = ["--config", config, f"people={tmp_path}/people", f"output={tmp_path}/corpus"]
    assert main("corpus", words) == 0
    said = capsys.readouterr().out
    assert "6 people done, 2 failed (1 × no_photos, 1 × too_few_photos)" in said
    assert "similarity of renders with the person's photos" in said
    assert "6 LoRAs made in" in said
    with Image.open(tmp_path / "corpus" / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    assert main("corpus", words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")} == before
    assert "4 of them done" in capsys.readouterr().out

    for name in ("person-020001", "person-020005"):
        shutil.move(tmp_path / name, tmp_path / "people" / name)
    shutil.rmtree(tmp_path / "people" / "person-020000")  # done already: that its photos are gone costs nothing
    assert main("corpus", words) == 0
    reader = CorpusReader(tmp_path / "corpus")
    assert reader.identities[-2:] == ["person-020001", "person-020005"]
    assert len(reader.identities) == len(PEOPLE)
    assert reader.statistics().count == len(PEOPLE)


@pytest.fixture
def killer() -> Callable[[str, int], list[int]]:
    """Kills Ray workers of this process with SIGKILL: `killer(word in their title, at most)`."""

    def kill(word: str, count: int) -> list[int]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                if word in title and "IDLE" not in title and len(found) < count:
                    process.send_signal(signal.SIGKILL)
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    return kill


def test_killed_workers_cost_time_and_nothing_else(
    job: ModuleType, config: str, tmp_path: Path, calm: dict[str, Any], killer: Callable[[str, int], list[int]]
) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill_now_and_then() -> None:
        """Whoever embeds as soon as it does, then whoever fine-tunes, before and between commits."""
        goals = [("MapBatches(Embed)", 0), ("MapBatches(Make)", 0), ("MapBatches(Make)", 1), ("MapBatches(Make)", 3)]
        while goals and not over.wait(0.02):
            word, committed = goals[0]
            if shards(tmp_path / "corpus") >= committed:
                found = killer(word, 2)
                if found:
                    killed.extend(found)
                    goals.pop(0)
                    over.wait(1.0)

    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        assert main("corpus", ["--config", config, f"output={tmp_path}/corpus"]) == 0
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 3, "too few workers were caught at work"
    assert outcome(tmp_path / "corpus") == calm


def deadly(job: ModuleType, identity: str) -> type:
    """The job's worker, but this person's photos kill the process as a bug in a decoder or driver would."""

    class Deadly(job.Make):  # type: ignore[name-defined, misc]
        def __init__(self, config: Any, ledger: Any) -> None:
            super().__init__(config, ledger)
            maker = self.make.maker

            def make(people: Any) -> Any:
                if any(person.identity == identity for person in people):
                    os._exit(1)
                return maker(people)

            self.make.maker = make

    return Deadly


def test_a_person_who_kills_every_worker_is_a_failure_and_costs_nobody_else(
    job: ModuleType, config: str, world: Path, tmp_path: Path, calm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "Make", deadly(job, "person-020002"))
    words = ["--config", config, f"output={tmp_path}/corpus", "workers.max_deaths=1"]
    assert main("corpus", words) == 0
    reader = CorpusReader(tmp_path / "corpus")
    failed = {f.identity: f.reason for f in reader.failures() if f.photo is None}
    assert failed == {"Zoë 😀": "no_photos", "a wall": "too_few_photos", "person-020002": "worker_died"}
    assert len(reader.identities) == len(PEOPLE) - 1


def full_disk(job: ModuleType, limit: int) -> type:
    """The job's worker on a disk that takes files of at most `limit` bytes (the kernel refuses, as with ENOSPC)."""

    class Full(job.Make):  # type: ignore[name-defined, misc]
        def __init__(self, config: Any, ledger: Any) -> None:
            super().__init__(config, ledger)
            commit = self.make.writer.commit

            def commit_on_a_full_disk(*args: Any) -> Any:
                old = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
                try:
                    return commit(*args)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, old)

            self.make.writer.commit = commit_on_a_full_disk

    return Full


def test_mistakes_are_named_before_any_work(
    job: ModuleType, config: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, message in (
        (["finetune.step=3"], "unknown config key 'finetune.step'. Did you mean 'finetune.steps'?"),
        (["people_per_group=0"], "people_per_group and groups_per_shard must be at least 1"),
        ([f"people={tmp_path}/empty"], "no people found at"),
        ([f"output={tmp_path}/file"], "a part of this path is a file, not a folder"),
        (["output=gs://bucket/x"], "give a local folder or s3://bucket/prefix"),
        (["base=nowhere/at-all"], "cannot load a base model from 'nowhere/at-all'"),
        ([f"people={tmp_path}/nobody"], f"{tmp_path}/nobody does not exist"),
        (["people=synthetic:many"], "Give a number, as in people=synthetic:40"),
        (["people=synthetic:60001"], "there are 60000 synthetic people for corpora"),
        (
            ["workers.finetune_gpus=1"],
            "wants 0.1 CPUs and 1 GPU (workers.finetune_cpus and finetune_gpus); this Ray has 8",
        ),
    ):
        assert main("corpus", ["--config", config, f"output={tmp_path}/corpus", *words]) == 1, words
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}  # and nobody was rendered anywhere


@pytest.mark.s3
def test_people_who_are_not_there_are_not_rendered_into_a_bucket(
    job: ModuleType, config: str, s3: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"people=s3://{bucket}/people", f"output={tmp_path}/corpus"]
    for more in ([], ["--dry-run"]):
        assert main("corpus", ["--config", config, *words, *more]) == 1
        assert f"no people found at s3://{bucket}/people" in capsys.readouterr().err
    assert not open_store(f"s3://{bucket}").folders()
    assert not (tmp_path / "corpus").exists()


def test_a_dry_run_finds_what_would_fail_for_everybody(
    config: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "base", tmp_path / "flux")
    index = tmp_path / "flux" / "model_index.json"
    other = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | other))
    shutil.copytree(world / "base", tmp_path / "silent")
    shutil.rmtree(tmp_path / "silent" / "tokenizer")
    for words, message in (
        ([f"base={tmp_path}/flux"], "it is a FLUX model, a transformer"),
        ([f"base={tmp_path}/silent"], "its tokenizer/ is missing"),
        (["dtype=float16"], "the base model is in float16"),
        (["lora.target_modules=[to_x]"], "target module 'to_x' matches no module"),
        ([f"embedder.model={tmp_path}/silent/unet"], "holds no .onnx file"),
    ):
        assert main("corpus", ["--config", config, "--dry-run", f"output={tmp_path}/corpus", *words]) == 1, words
        assert message in capsys.readouterr().err


def test_a_fault_of_everybody_and_a_full_disk_end_the_run_clearly_and_the_next_run_makes_everybody(
    job: ModuleType,
    config: str,
    tmp_path: Path,
    calm: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(job.Make):  # type: ignore[name-defined, misc]
        def __init__(self, config: Any, ledger: Any) -> None:
            super().__init__(config, ledger)
            self.make.maker.base.tokenizer.model_max_length = 10**30

    words = ["--config", config, f"output={tmp_path}/corpus"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "Make", Broken)
        assert main("corpus", words) == 1
    assert "fails for everybody, also for a stand-in with pictures of noise" in capsys.readouterr().err
    store = open_store(tmp_path / "corpus")
    # a shard all of whose people have reasons of their own may be there
    assert not any(f.reason == "error" for f in CorpusReader(store).failures())
    assert not CorpusReader(store).identities

    with monkeypatch.context() as patch:
        patch.setattr(job, "Make", full_disk(job, 2_000))
        assert main("corpus", words) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "run the same command again" in said
    assert not list((tmp_path / "corpus").rglob("*.tmp"))

    assert main("corpus", words) == 0
    assert outcome(tmp_path / "corpus") == calm


def test_synthetic_people_are_rendered_beside_the_corpus(
    job: ModuleType, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", config, "people=synthetic:2", f"output={tmp_path}/corpus", "score.prompts=[]"]
    assert main("corpus", words) == 0
    assert f"rendering 2 synthetic people to {tmp_path}/corpus-people" in capsys.readouterr().out
    assert CorpusReader(tmp_path / "corpus").identities == ["person-020000", "person-020001"]
    assert CorpusReader(tmp_path / "corpus").manifest.config["people"] == "synthetic:2"
    assert main("corpus", words) == 0
    assert "rendering" not in capsys.readouterr().out


def test_another_recipe_in_the_same_place_is_refused(
    job: ModuleType, config: str, calm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(calm_folder, tmp_path / "corpus")
    words = ["--config", config, f"output={tmp_path}/corpus"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main("corpus", [*words, "finetune.steps=3"]) == 1
    said = capsys.readouterr().err
    assert "finetune.steps: 2 there, 3 now" in said
    assert "Choose another output" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dry_run_says_what_it_costs_and_touches_nothing(
    job: ModuleType, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", config, "--dry-run", f"output={tmp_path}/corpus", "finetune.steps=77"]
    assert main("corpus", words) == 0
    said = capsys.readouterr().out
    assert "steps: 77" in said
    assert "10 people of" in said
    assert "in 5 shards of 2, 0 of them done" in said
    assert "cost: 10 LoRAs × 3.00 s (stated by seconds_per_lora)" in said
    assert not (tmp_path / "corpus").exists()


@pytest.mark.s3
def test_an_unwritable_bucket_is_named(
    job: ModuleType, config: str, s3: S3Server, bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    assert main("corpus", ["--config", config, f"output=s3://{bucket}/corpus"]) == 1
    assert "permission denied" in capsys.readouterr().err


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_killed_driver_on_a_busy_store_and_the_same_command_again(
    config: str, calm: dict[str, Any], s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    """S3 throttles and breaks connections all the while; the driver dies after the first shard."""
    words = ["--config", config, f"output=s3://{bucket}/corpus"]
    store = open_store(f"s3://{bucket}/corpus")
    with faulty(s3.endpoint, seed=3, throttled=0.04, refused=0.03, cut=0.03) as proxy:
        env = {**s3.env, "AWS_ENDPOINT_URL": proxy.endpoint}
        with driver(JOB, words, env, tmp_path / "first.log") as process:
            while process.poll() is None and not store.files("shards"):
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed_at = len(store.files("shards"))
        with driver(JOB, words, env, tmp_path / "second.log") as process:
            assert process.wait(timeout=600) == 0, (tmp_path / "second.log").read_text()
    assert 1 <= killed_at < 5, (tmp_path / "first.log").read_text()
    assert proxy.counts["throttled"] > 0
    assert proxy.counts["refused"] + proxy.counts["cut"] > 0
    assert outcome(f"s3://{bucket}/corpus") == calm


@pytest.mark.timeout(900)
def test_a_lost_node_costs_time_and_nothing_else(config: str, calm: dict[str, Any], tmp_path: Path) -> None:
    """A cluster of a head and two machines loses one in the middle; see lose_a_node.py."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parents[1] / "support" / "lose_a_node.py"), config]
    done = subprocess.run([*command, str(tmp_path / "corpus")], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a node was lost" in done.stdout
    assert outcome(tmp_path / "corpus") == calm


def test_it_is_a_program_that_ray_job_submit_can_start() -> None:
    assert os.access(JOB, os.X_OK)
    assert JOB.read_text().startswith("#!/usr/bin/env python\n")
    mode = subprocess.run(["git", "ls-files", "-s", str(JOB)], cwd=ROOT, capture_output=True, text=True).stdout
    assert mode.startswith("100755") or not (ROOT / ".git").exists()


def test_vectors_differ_between_people_and_from_zero(calm: dict[str, Any]) -> None:
    """The equalities above would hold for a job that writes zeros."""
    vectors = np.frombuffer(calm["vectors"], np.float32).reshape(len(PEOPLE), -1)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1) + np.eye(len(PEOPLE))
    assert distances.min() > 1e-6
    assert np.abs(vectors).max() > 0
