"""One way to run a job: options in any order, refusals in a sentence, Ctrl-C, exit codes, and nothing heavy for --help."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray.exceptions

from lora_diffusion.jobs import run
from lora_diffusion.jobs.causes import RunAgain
from lora_diffusion.jobs.run import JOBS, Job, main, read_options, run_job
from lora_diffusion.places import Output

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "build_corpus": "corpus",
    "import_weights2weights": "import-weights2weights",
    **{job: job for job in ("train", "evaluate", "ablate", "publish")},
}


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


def test_an_output_that_cannot_be_written_is_named_also_by_a_dry_run(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for words in (["--dry-run"], []):
        made, asked = job()
        assert run_job(made, [f"output={tmp_path}/file/x", *words]) == 1
        assert "a part of this path is a file, not a folder" in capsys.readouterr().err
        assert not asked


@pytest.mark.s3
def test_a_missing_bucket_is_named_also_by_a_dry_run(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str], s3: object
) -> None:
    for words in (["--dry-run"], []):
        made, asked = job()
        assert run_job(made, ["output=s3://no-such-bucket/x", *words]) == 1
        assert "cannot use s3://no-such-bucket/x: the bucket does not exist" in capsys.readouterr().err
        assert not asked


def test_a_store_that_does_not_answer_gets_a_word_and_then_an_end(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One port that nobody listens at, and one where somebody listens and never says anything."""
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        for listener, word in ((closed, ""), (silent, "waiting for s3://bucket/x at http://127.0.0.1:")):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
            made, asked = job()
            assert run_job(made, ["output=s3://bucket/x", "--dry-run"]) == 1
            said = capsys.readouterr()
            assert "cannot use s3://bucket/x: the store does not answer" in said.err
            assert "Check AWS_ENDPOINT_URL and the network" in said.err
            assert word in said.out
            assert not asked


LEDGER_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: InMemoryAttempts
The actor is dead because its worker process has died. Some common causes include: (1) the process was killed by the OOM killer
due to high memory usage, (2) ray stop --force was called"""


def _raise(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def test_the_exit_code_says_what_happened(
    job: Callable[..., tuple[Job, list[_Config]]], capsys: pytest.CaptureFixture[str]
) -> None:
    died = ray.exceptions.ActorDiedError()
    died.error_msg = LEDGER_DIED
    met_by_a_worker = ray.exceptions.UnserializableException(
        f"ray::Make.submit()\nray.exceptions.ActorDiedError: {LEDGER_DIED}"
    )
    for error, code, message in (
        (ValueError("a, not b: give b"), 1, "job: a, not b: give b\n"),
        (OSError("the disk is full"), 1, "job: the disk is full\n"),
        (MemoryError(), 1, "job: memory ended, and what was finished is kept. Use machines with more of it"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "job: memory ended"),
        (RunAgain("3 people are in no shard: run the same command again"), 3, "job: 3 people are in no shard"),
        (ray.exceptions.ActorDiedError(), 3, "job: a part of Ray ended (The actor died unexpectedly"),
        (
            died,
            3,
            "job: InMemoryAttempts ended (The actor died unexpectedly before finishing this task): run the same",
        ),
        (
            met_by_a_worker,
            3,
            "job: InMemoryAttempts ended (The actor died unexpectedly before finishing this task): run",
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
    for words in ([], ["configs/serve_tiny.yaml"], ["--config", "serve_tiny.yaml"]):
        assert main("serve", [*words, "--dry-run"]) == 0
        assert "synthesizer: tiny\n" in capsys.readouterr().out
    (tmp_path / "serve_tiny.yaml").write_text("licence: mine")  # what lies here goes first
    assert main("serve", ["serve_tiny.yaml", "--dry-run"]) == 0
    assert "licence: mine\n" in capsys.readouterr().out
    for name in ("configs/mine.yaml", "elsewhere/serve_tiny.yaml"):
        assert main("serve", [name, "--dry-run"]) == 1
        said = capsys.readouterr().err
        assert (
            f"config file '{tmp_path}/{name}' does not exist; give a path, or one that comes with this package: "
            in said
        )
        assert "serve_sd15.yaml, serve_tiny.yaml, " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("corpus people=nope", "nope does not exist .*: people must name a folder for each person"),
        ("corpus people=empty", "no people found at .*/empty: expected a folder for each person"),
        ("train corpus=nope", "no corpus at .*/nope"),
        ("train stage=pictures", "stage=pictures needs pictures.people"),
        ("train pictures.start=tiny pictures.people=nope", "nope does not exist"),
        ("train pictures.start=nope pictures.people=people", "there is no synthesiser at nope"),
        ("evaluate corpus=nope", "no corpus at .*/nope"),
        ("publish synthesizer=./nope", "there is no synthesiser at .*/nope .*: give a folder that jobs/train.py"),
        ("publish synthesizer=tiny corpus=nope labels=nope", "no corpus at .*/nope"),
        ("publish synthesizer=tiny labels=nope", "corpus and labels belong together"),
        ("publish synthesizer=tiny draw.guidance=2", "draw has no setting 'guidance'; there are guidance_scale, "),
        ("serve synthesizer=tinny", "there is no synthesiser at tinny .* or the name of a shipped one: tiny"),
        ("serve base=./nope", "there is no base model at .*/nope: set base to a folder"),
        ("serve port=99999", "port is 99999: it is a number from 1 to 65535"),
    ],
)
def test_a_dry_run_fails_where_an_input_is_missing(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "people" / "ada").mkdir(parents=True)
    (tmp_path / "people" / "ada" / "0.jpg").write_bytes(b"never opened")
    name, *settings = words.split()
    settings += [] if name == "serve" else [f"output={tmp_path}/out"]
    assert main(name, [*settings, "--dry-run"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0]), said
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_is_one_sentence_and_nothing_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main("serve", [f"port={port}", "--ray-address", "local"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"serve: port {port} is taken: end what listens there, or choose another, such as port={port + 1}\n"


@pytest.mark.slow
def test_a_dry_run_touches_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    """On an account where nothing is: the models of sd15.yaml are not here, and stay where they are."""
    for name in ("home", "tmp", "people/ada"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "people" / "ada" / "0.jpg").write_bytes(b"never opened")
    env = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    before = sorted(tmp_path.rglob("*"))
    script = (
        "import sys; from lora_diffusion.jobs.run import main\n"
        f"sys.exit(main('corpus', ['--dry-run', 'configs/sd15.yaml', 'people={tmp_path}/people', 'output={tmp_path}/out'])"
        f" or main('corpus', ['--dry-run', 'output={tmp_path}/out'])"
        f" or not main('train', ['--dry-run', 'corpus={tmp_path}/out', 'output={tmp_path}/run'])"
        f" or not main('evaluate', ['--dry-run', 'corpus={tmp_path}/out', 'output={tmp_path}/run']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is not on this machine yet" in done.stdout
    assert f"1 people of {tmp_path}/people in 1 shard of 16, 0 of them done -> {tmp_path}/out" in done.stdout
    assert "cost: 1 LoRAs × 18.00 s (stated by seconds_per_lora)" in done.stdout
    assert f"40 synthetic people, rendered to {tmp_path}/out-people unless they are there" in done.stdout
    assert done.stderr.count("no corpus at") == 2
    of_torch = {path for path in tmp_path.rglob("*") if path.name.startswith("torchinductor")}  # made by its import
    assert sorted({*tmp_path.rglob("*")} - of_torch) == before
