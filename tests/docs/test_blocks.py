"""Code in documents: every command of ours is one that there is, with options and keys that there are; and what can run offline runs.

`<!-- run -->` before a shell block: it is run, with a photo `ada.jpg`, people in `photos/` and a LoRA `bought.safetensors` beside it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion.config import load_config
from lora_diffusion.jobs.run import JOBS, read_options

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
HISTORY = ("LOG.md", "CHANGELOG.md", "docs/log/")  # these may name what is gone
DOCUMENTS = [name for name in TRACKED if name.endswith(".md") and not name.startswith(HISTORY)]
EXECUTED = [  # Python blocks, all of a document one after the other, as a reader would type them
    "README.md",
    "docs/guides/notebook.md",
    "docs/guides/edits.md",
    "docs/guides/weights2weights.md",
    "docs/guides/another-base-model.md",
    "docs/explanations/page.md",
]
DRAWS = {"README.md", "docs/guides/notebook.md", "docs/explanations/page.md"}  # pictures: some seconds
SCRIPTS = {
    "jobs/build_corpus.py": "corpus",
    **{f"jobs/{job}.py": job for job in ("train", "evaluate", "ablate", "publish")},
    "jobs/import_weights2weights.py": "import-weights2weights",
}


def blocks(name: str, language: str, mark: str = "") -> list[str]:
    text = (ROOT / name).read_text()
    return re.findall(rf"^{re.escape(mark)}```{language}\n(.*?)^```", text, re.M | re.S)


def lines() -> Iterator[tuple[str, list[str]]]:
    """Document and words of every command in it, without variables before it; also those in `code` that begin like one."""
    for name in DOCUMENTS:
        for block in blocks(name, "bash"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line.split(" | ")[0], comments=True)
                while words and re.fullmatch(r"(export|[A-Z_]+=.*)", words[0]):
                    words.pop(0)
                if words:
                    yield name, words
        for inline in re.findall(r"`((?:make|jobs/\w+\.py|lora-diffusion) [^`]+)`", (ROOT / name).read_text()):
            if "..." not in inline and "…" not in inline:
                yield name, shlex.split(inline)


def check_job(job: str, words: list[str]) -> None:
    """Raises ValueError for an option, a file or a key that the job does not have."""
    options = read_options(JOBS[job], [word for word in words if word != "..."])
    assert options.config is None or options.config.exists() or not str(options.config).startswith("configs/"), (
        options.config
    )
    module: Any = importlib.import_module(JOBS[job].module)
    config = options.config if options.config and options.config.exists() else None
    required = {"publish": ["synthesizer=a", "output=b"]}.get(job, []) if config is None else []
    load_config(module.Config, config, [*required, *options.overrides])


def check_options(command: str, words: list[str]) -> None:
    """Of personalize, convert and forget, by what they say to --help."""
    help_text = (
        (ROOT / "docs/reference/command-line.md")
        .read_text()
        .partition(f"## lora-diffusion {command}\n")[2]
        .partition("\n## ")[0]
    )
    unknown = [word for word in words if word.startswith("--") and not re.search(rf"^  {word}\b", help_text, re.M)]
    assert unknown == []


def check(words: list[str]) -> None:
    """One command. Those of other programs are not looked at, but for the files and extras of ours that they name."""
    if words[:3] == ["ray", "job", "submit"]:
        script = next((i for i, word in enumerate(words) if word.startswith("jobs/")), None)
        assert script is not None, words
        words = words[script:]
    if words[0] in ("python", "python3") and len(words) > 1 and words[1] != "-m":
        words = words[1:]
    first = words[0]
    if first in SCRIPTS:
        check_job(SCRIPTS[first], words[1:])
    elif first == "lora-diffusion" and words[1].partition("|")[0] in JOBS:
        check_job(words[1], words[2:]) if "|" not in words[1] else None
    elif first == "lora-diffusion" and words[1] in ("personalize", "convert", "verify", "forget"):
        check_options(words[1], words[2:])
    elif first == "lora-diffusion":
        assert words[1] in ("--help", "--version") or words[1:] == ["corpus|train|evaluate|ablate|publish|serve"], words
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets, f"no target {words[1]}"
    elif first == "pip" and any(extras := re.search(r"\[([\w,]+)\]", word) for word in words):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras is not None
        assert set(extras[1].split(",")) <= set(known) | {"default"}, extras[1]
    elif re.match(r"(jobs|benchmarks|runs|docs|examples)/[\w/]+\.(py|sh)$", first):
        assert (ROOT / first).exists(), first
        text = (ROOT / first).read_text()
        text += "".join(
            (ROOT / name).read_text() for name in re.findall(r"runs/\w+\.py", text)
        )  # where a shell script hands them on
        unknown = [word for word in words if re.match(r"--\w", word) and f'"{word.partition("=")[0]}"' not in text]
        assert not unknown or "parse_options" in text, f"{first} has no {unknown}"


COMMANDS = list(dict.fromkeys((name, tuple(words)) for name, words in lines()))


def test_there_are_commands_to_check() -> None:
    ours = [words[0] for _, words in COMMANDS]
    assert ours.count("lora-diffusion") > 10
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_every_command_is_one_that_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for place, words in COMMANDS:
        if place == name:
            try:
                check(list(words))
            except (ValueError, AssertionError, IndexError, argparse.ArgumentError) as error:
                pytest.fail(f"{name}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize(
    "command",
    [
        "lora-diffusion corpus people=photos finetune.stepps=3",
        "jobs/publish.py s3://bucket/synthesizer --out s3://bucket/published",
        "ray job submit jobs/train.py -- pca.componnents=3",
        "lora-diffusion train configs/nowhere.yaml",
        "make everything",
        "pip install 'lora-diffusion[nothing]'",
        "benchmarks/nothing.py",
        "lora-diffusion personalise ada.jpg",
    ],
)
def test_a_command_that_is_none_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, AssertionError)):
        check(shlex.split(command))


# --- what runs


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it."""
    import torch

    from lora_diffusion import LoRALayout, save_lora
    from lora_diffusion.models.known_unets import meta_unet

    people = ROOT / "lora_diffusion/endpoint/static/people"
    for link in ("lora_diffusion", "configs", "jobs", "serve", "docs", "benchmarks"):
        (tmp_path / link).symlink_to(ROOT / link)
    shutil.copy(people / "80512.jpg", tmp_path / "ada.jpg")
    shutil.copy(people / "80512.jpg", tmp_path / "ada2.jpg")
    for number, photo in enumerate(sorted(people.glob("*.jpg"))[:2]):
        (tmp_path / "photos" / photo.stem).mkdir(parents=True)
        for side in range(2):
            Image.open(photo).resize((96 + side, 96 + side)).save(
                tmp_path / "photos" / photo.stem / f"{number}{side}.png"
            )
    layout = LoRALayout.from_unet(meta_unet("sd1"), rank=1, target_modules=("to_q", "to_k"))
    save_lora(torch.zeros(layout.size), layout, tmp_path / "bought.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in DRAWS else []) for n in EXECUTED])
def test_python_blocks_run(name: str, desk: Path) -> None:
    names: dict[str, Any] = {}
    (desk / "lora_diffusion").unlink()  # a block may write there
    people = "lora_diffusion/endpoint/static/people"
    shutil.copytree(ROOT / people, desk / people)
    (desk / "lora_diffusion/assets").symlink_to(ROOT / "lora_diffusion/assets")
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), names)


@pytest.mark.slow
def test_python_blocks_of_the_client_run(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the endpoint in this process, at an address of its own."""
    from http_endpoint import in_process

    from lora_diffusion.endpoint.api import build_api
    from lora_diffusion.endpoint.local import local_studio
    from lora_diffusion.serving.config import ServeConfig

    with in_process(build_api(local_studio(ServeConfig()))) as address:
        for block in blocks("docs/guides/client.md", "python"):
            exec(compile(block.replace("http://127.0.0.1:8000", address), "client.md", "exec"), {})
    assert (desk / "older.png").exists()
    assert (desk / "ada.safetensors").exists()


RUN = "<!-- run -->\n"
SHELL = [(name, number) for name in DOCUMENTS for number in range(len(blocks(name, "bash", RUN)))]


def test_some_shell_blocks_are_run() -> None:
    assert {name for name, _ in SHELL} >= {
        "docs/guides/client.md",
        "docs/guides/photos.md",
        "docs/reference/formats.md",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), SHELL)
def test_shell_blocks_run(name: str, number: int, desk: Path) -> None:
    block = blocks(name, "bash", RUN)[number]
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
