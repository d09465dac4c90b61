"""One way to run a job: options in any order, refusals in a sentence, Ctrl-C, exit codes, and nothing heavy for --help."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray.exceptions

from lora_diffusion.jobs.causes import RunAgain
from lora_diffusion.jobs.run import JOBS, Job, main, read_options, run_job
from lora_diffusion.storage import Output

ROOT = Path(__file__).parents[2]
SCRIPTS = {"build_corpus": "corpus", "train": "train", "evaluate": "evaluate", "ablate": "ablate", "publish": "publish"}


@dataclass(frozen=True)
class _Config:
    output: Output = "out"
    steps: int = 1


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Job, list[_Config]]]:
    """A job that notes what it is asked, and then does as it is told."""

    def make(run: Callable[[], None] = lambda: None) -> tuple[Job, list[_Config]]:
        asked: list[_Config] = []
        module = types.ModuleType("a_job", "What it does.\n\nHow.")

        def work(config: _Config, address: str) -> None:
            asked.append(config)
            run()

        module.__dict__.update(Config=_Config, run=work, dry_run=lambda config: f"would write {config.output}")
        monkeypatch.setitem(sys.modules, "a_job", module)
        return Job("job", "a_job"), asked

    return make


@pytest.mark.parametrize(
    "words",
    [
        ["people=a", "--config", "c.yaml", "base=x", "--dry-run"],
        ["--dry-run", "c.yaml", "people=a", "base=x"],
        ["people=a", "c.yaml", "--dry-run", "base=x"],
        ["people=a", "base=x", "--config=c.yaml", "--dry-run"],
        ["--", "people=a", "--dry-run", "base=x", "c.yaml"],
        ["people=a", "base=x", "--dry-run", "--ray-address", "auto", "c.yaml"],
    ],
)
def test_options_stand_in_any_order_for_all_jobs(words: list[str]) -> None:
    for job in JOBS.values():
        found = read_options(job, words)
        assert (found.config, found.overrides, found.dry_run) == (Path("c.yaml"), ["people=a", "base=x"], True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--people=a"], "there is no option --people: settings are written people=a"),
        (["--people", "a"], "there is no option --people: settings are written people=..."),
        (["photos"], "'photos' is neither a setting (key=value, such as finetune.steps=80) nor a YAML file"),
        (["a.yaml", "--config", "b.yaml"], "one configuration at a time, not b.yaml and a.yaml"),
        (["--config"], "expected one argument"),
        (["no-such.yaml"], "no-such.yaml' does not exist"),
        (["step=3"], "unknown config key 'step'. Did you mean 'steps'?"),
        (["steps=many"], "config key 'steps' must be a whole number, not 'many'"),
        (["output=gs://b/x"], "output: cannot open 'gs://b/x': give a local folder or s3://bucket/prefix"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(
    words: list[str], message: str, job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str]
) -> None:
    made, asked = job()
    assert run_job(made, words) == 1
    said = capsys.readouterr().err
    assert said.startswith("job: ")
    assert message in said
    assert said.count("\n") == 1
    assert not asked


def test_a_job_gets_addresses_and_a_dry_run_nothing_but_words(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, asked = job()
    (tmp_path / "c.yaml").write_text("steps: 5")
    assert run_job(made, ["output=x", "--dry-run", str(tmp_path / "c.yaml")]) == 0
    assert not asked
    said = capsys.readouterr().out
    assert "output: x\nsteps: 5\n" in said
    assert f"would write {Path.cwd()}/x" in said
    assert run_job(made, ["output=x", str(tmp_path / "c.yaml")]) == 0
    assert asked == [_Config(f"{Path.cwd()}/x", 5)]


def _raise(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def test_the_exit_code_says_what_happened(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, message in (
        (ValueError("a, not b: give b"), 1, "job: a, not b: give b\n"),
        (OSError("the disk is full"), 1, "job: the disk is full\n"),
        (MemoryError(), 1, "job: memory ended, and what was finished is kept. Use machines with more of it"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "job: memory ended"),
        (RunAgain("3 people are in no shard: run the same command again"), 3, "job: 3 people are in no shard"),
        (
            ray.exceptions.ActorDiedError("The actor died unexpectedly: its node died."),
            3,
            "job: a part of Ray ended (The actor died unexpectedly: its node died): run the same command again",
        ),
        (KeyboardInterrupt(), 130, "job: Stopped. The same command goes on.\n"),
    ):
        made, _ = job(_raise(error))
        assert run_job(made, []) == code
        assert capsys.readouterr().err.startswith(message)
    ours = ray.exceptions.RayTaskError("task", "traceback", KeyError("x")).as_instanceof_cause()
    for error in (KeyError("a fault of ours"), ours):
        made, _ = job(_raise(error))
        with pytest.raises(KeyError):  # its traceback is wanted
            run_job(made, [])


@pytest.mark.parametrize("name", sorted(JOBS))
def test_help_is_there_at_once(name: str) -> None:
    """What takes the seconds is importing torch, ray and pyarrow: none of them is."""
    script = (
        "import sys; from lora_diffusion.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "finally: sys.stderr.write(','.join({'torch', 'ray', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "key=value" in done.stdout
    assert done.stdout.count("\n") > 15
    assert done.stderr == ""


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_the_scripts_are_programs_that_ray_job_submit_can_start_and_the_same_commands(script: str) -> None:
    path = ROOT / "jobs" / f"{script}.py"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python\n")
    if (ROOT / ".git").exists():
        mode = subprocess.run(["git", "ls-files", "-s", str(path)], cwd=ROOT, capture_output=True, text=True).stdout
        assert mode.startswith("100755")
    done = subprocess.run([sys.executable, str(path), "--no-such"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{SCRIPTS[script]}: there is no option --no-such")


def test_a_shipped_configuration_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("serve", ["configs/serve_sd15.yaml", "--dry-run"]) == 0
    assert "s3://your-bucket/synthesizer-sd15" in capsys.readouterr().out
    assert main("serve", ["configs/mine.yaml", "--dry-run"]) == 1
