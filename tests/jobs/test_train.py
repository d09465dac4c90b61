"""Laws of jobs/train.py on a real Ray: kill it anywhere, share it among workers, and the losses stay what they are."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from drivers import driver
from low_rank_corpus import LAYOUT, write_corpus
from s3_server import S3Server

from lora_diffusion.config import load_config
from lora_diffusion.jobs.run import main
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.begin import begin
from lora_diffusion.synthesis.training.dataset import open_rows
from lora_diffusion.synthesis.training.metrics import losses, read_metrics
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "train.py"
TWO_CPUS = ROOT / "tests" / "support" / "two_cpus.py"
LOOP = {"batch_size": 8, "warmup": 2, "log_every": 5}
# Long enough to be caught at work, far too short to learn anything.
SETTINGS: dict[str, Any] = {
    "vae": {"latent_size": 6, "hidden": [12], "dropout": 0.0},
    "pca": {"num_components": 6},
    "denoiser": {"width": 16, "depth": 1, "condition_width": 16, "generator_width": 4, "rank": 2, "linear_guess": True},
    "vae_training": {**LOOP, "steps": 20, "validate_every": 10, "checkpoint_every": 10},
    "denoiser_training": {**LOOP, "steps": 100, "validate_every": 25, "checkpoint_every": 10},
    "workers": {"num_workers": 2, "cpus": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus/`, and `config.yaml` for it."""
    folder = tmp_path_factory.mktemp("train")
    write_corpus(open_store(folder / "corpus"), 40, bad={5: "nan", 9: "failed"})
    values = {**SETTINGS, "corpus": str(folder / "corpus"), "data": {"cache": str(folder / "cache")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Store:
    """What one worker makes of it, undisturbed and without Ray."""
    output = folder / "alone"
    config = load_config(TrainConfig, folder / "config.yaml", [f"output={output}"])
    snapshot = begin(config)
    rows = open_rows(snapshot, config.data)
    SynthesizerTraining(config, snapshot, rows, open_store(output), say=lambda line: None).run()
    return open_store(output)


def assert_same_run(store: Store, expected: Store) -> None:
    """The same reports in the same order, with the same losses but for float noise; and LoRAs as alike."""
    found, wanted = losses(read_metrics(store)), losses(read_metrics(expected))
    assert [(line["stage"], line["step"]) for line in found] == [(line["stage"], line["step"]) for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-3), line
    face = np.random.default_rng(0).normal(size=512)
    made, same = (Synthesizer.from_pretrained(f"{s.uri}/synthesizer").from_embedding(face) for s in (store, expected))
    assert made.shape == (1, LAYOUT.size)
    np.testing.assert_allclose(made, same, rtol=1e-2, atol=1e-3)


def steps_saved(store: Store, stage: str) -> int:
    """The last step in the log, which is written with each checkpoint."""
    return max((int(line["step"]) for line in read_metrics(store) if line["stage"] == stage), default=0)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_killed_driver_on_s3_and_the_same_command_again(
    folder: Path, alone: Store, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    """Two workers, corpus and output in a bucket; kill -9 in the middle; against one worker that nobody disturbed."""
    write_corpus(open_store(f"s3://{bucket}/corpus"), 40, bad={5: "nan", 9: "failed"})
    store = open_store(f"s3://{bucket}/run")
    places = [f"corpus=s3://{bucket}/corpus", f"output={store.uri}", "data.cache="]
    words = [str(folder / "config.yaml"), *places]
    with driver(JOB, words, s3.env, tmp_path / "first.log") as process:
        while process.poll() is None and not steps_saved(store, "denoiser"):
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = steps_saved(store, "denoiser")
    assert 0 < killed_at < 100, (tmp_path / "first.log").read_text()
    # Ctrl-C, and then once more, on a Ray whose two CPUs the two workers take
    with driver(TWO_CPUS, ["train", *words], s3.env, tmp_path / "second.log") as process:
        while process.poll() is None and steps_saved(store, "denoiser") == killed_at:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 130, (tmp_path / "second.log").read_text()
    assert "train: Stopped. The same command goes on." in (tmp_path / "second.log").read_text()
    with driver(TWO_CPUS, ["train", *words], s3.env, tmp_path / "third.log") as process:
        assert process.wait(timeout=600) == 0, (tmp_path / "third.log").read_text()
    said = (tmp_path / "third.log").read_text()
    assert "denoiser: goes on after step" in said
    assert "left out: 1 × nan_vector" in said
    assert_same_run(store, alone)


def kill_when(ready: Callable[[], bool], word: str, killed: list[int], over: threading.Event) -> None:
    """SIGKILL to one child process with `word` in its title, as soon as `ready`."""
    while not over.wait(0.02):
        if not ready():
            continue
        for process in psutil.Process().children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
            except psutil.Error:
                continue


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_time_and_nothing_else(
    ray_local: None, folder: Path, alone: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under FSDP, so that the two workers hold half of everything each."""
    store = open_store(tmp_path / "run")
    words = [str(folder / "config.yaml"), f"output={store.uri}", "workers.parallel=fsdp"]
    killed: list[int] = []
    over = threading.Event()
    ready = lambda: steps_saved(store, "denoiser") > 0  # noqa: E731
    thread = threading.Thread(target=kill_when, args=(ready, "RayTrainWorker", killed, over))
    thread.start()
    try:
        assert main("train", words) == 0
    finally:
        over.set()
        thread.join()
    assert killed, "nobody was caught at work"
    assert "denoiser: goes on after step" in capsys.readouterr().out
    assert_same_run(store, alone)
    # what only a worker can see is told as clearly, and nothing is tried again
    kept = store.read("config.yaml")
    assert main("train", [*words, "condition=photo"]) == 1
    assert "condition: 'mean' there, 'photo' now" in capsys.readouterr().err
    # and so is what this Ray cannot give
    assert main("train", [*words, "workers.use_gpu=true", f"output={tmp_path}/other"]) == 1
    assert "training wants 1 CPU and 1 GPU for each of 2 workers (workers.num_workers" in capsys.readouterr().err
    assert store.read("config.yaml") == kept
    assert not (tmp_path / "other").exists()
    assert_same_run(store, alone)


def test_mistakes_are_named_before_any_work(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["vae.latent=3"], "unknown config key 'vae.latent'. Did you mean 'vae.latent_size'?"),
        ([f"corpus={tmp_path}/nowhere"], "no corpus at"),
        (["layout_id=0123456789abcdef"], "the configuration asks for 0123456789abcdef"),
        (["output=gs://bucket/x"], "give a local folder or s3://bucket/prefix"),
        (["workers.max_workers=1"], "max_workers is 1, fewer than num_workers, 2"),
        (["vae_training.batch_size=1"], "batch_size is 1, for up to 2 workers"),
    ):
        assert main("train", [str(folder / "config.yaml"), f"output={tmp_path}/run", *words]) == 1, words
        assert message in capsys.readouterr().err
    assert main("train", ["--dry-run", str(folder / "config.yaml"), f"output={tmp_path}/run"]) == 0
    said = capsys.readouterr().out
    assert "latent_size: 6" in said
    assert "39 people with a LoRA in 5 shards" in said
    assert not (tmp_path / "run").exists()


def test_it_is_a_program_that_ray_job_submit_can_start() -> None:
    assert os.access(JOB, os.X_OK)
    assert JOB.read_text().startswith("#!/usr/bin/env python\n")
    mode = subprocess.run(["git", "ls-files", "-s", str(JOB)], cwd=ROOT, capture_output=True, text=True).stdout
    assert mode.startswith("100755") or not (ROOT / ".git").exists()


@pytest.mark.parametrize("name", ["train_tiny", "train_sd15"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml")
    assert config.stages == {"train_tiny": ("pca", "denoiser"), "train_sd15": ("pca", "vae", "denoiser")}[name]
