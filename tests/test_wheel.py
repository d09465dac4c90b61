"""What is installed from the wheel, in environments that hold nothing but what its extras ask for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from empty_venv import build_wheel, install
from http_endpoint import in_process
from s3_server import free_port

from lora_diffusion.endpoint.local import local_api
from lora_diffusion.serving.config import ServeConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "lora_diffusion/endpoint/static/people/80512.jpg"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
START_SECONDS = 240.0  # on a busy machine


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, "client", tmp_path_factory.mktemp("client"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in an empty folder, where nothing of the repository is in reach."""

    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
        )

    return call


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "lora_diffusion"
    kept = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in kept} == {name for name in names if ".dist-info/" not in name}
    for name in (
        "configs/sd15.yaml",
        "endpoint/app.yaml",
        "endpoint/static/index.html",
        "assets/synthesizer/config.json",
    ):
        assert f"lora_diffusion/{name}" in names
    assert wheel.stat().st_size < 30e6


def test_a_client_needs_no_torch(
    client: Path, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert run(client / "python", "-c", "import torch").returncode
    assert run(client / "python", "-c", "import numpy").returncode
    with in_process(local_api(ServeConfig())) as address:
        done = run(client / "lora-diffusion", "personalize", PHOTO, "--out", "ada", "--server", address, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (tmp_path / "ada").iterdir()} == {".safetensors", ".png"}


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["personalize", str(PHOTO), "--out", "ada"], "torch"),
        (["convert", "a.safetensors", "b.safetensors"], "torch"),
        (["corpus", "people=photos"], "ray"),
        (["train", "--dry-run"], "ray"),
        (["evaluate"], "ray"),
        (["serve"], "serve"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra_in_one_sentence(
    client: Path, run: Callable[..., subprocess.CompletedProcess[str]], words: list[str], extra: str
) -> None:
    done = run(client / "lora-diffusion", *words)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "this needs " in done.stderr
    assert done.stderr.endswith(f", which is not installed: pip install 'lora-diffusion[{extra}]'\n")


def test_a_public_name_says_which_extra_it_needs(
    client: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run(client / "python", "-c", "import lora_diffusion.client; from lora_diffusion import Synthesizer")
    assert re.search(r"this needs \w+, which is not installed: pip install 'lora-diffusion\[torch\]'\n$", done.stderr)


@pytest.mark.ray
def test_the_service_answers_a_photo(wheel: Path, tmp_path: Path) -> None:
    programs, port = install(wheel, "serve", tmp_path / "venv"), free_port()
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [str(programs / "lora-diffusion"), "serve", f"port={port}"]
        service = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not _ready(address):
            assert service.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        form = {"prompt": "a photo of sks person", "num_inference_steps": "2"}
        answer = httpx.post(f"{address}/v1/personalize", files={"photo": PHOTO.read_bytes()}, data=form, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["images"]) == 1
        assert "<html" in httpx.get(address, timeout=10).text
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0, log.read_text()


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=10).is_success
    except httpx.TransportError:
        return False


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_run_script_goes_the_whole_way_and_a_second_time_does_nothing_but_ask_the_endpoint(
    wheel: Path, tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """First with the wheel and its extra `ray` alone, then as in the repository, where the endpoint can be started."""
    script, out = ROOT / "runs" / "sd15.sh", tmp_path / "out"
    first = ["env", "SHAPE=tiny", f"OUT={out}", "RAY_ADDRESS=local", "PORT=8932"]
    done = run(*first, f"PYTHON={install(wheel, 'ray', tmp_path / 'venv') / 'python'}", "PHOTO=", script)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "evaluation/report.html").exists()
    made = [*(out / "corpus").rglob("*.parquet"), *(out / "training/checkpoints").glob("*")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert before
    done = run(*first, f"PYTHON={sys.executable}", script)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "photo -> LoRA and picture in" in done.stdout
    assert (out / "personalised/lora.safetensors").exists()
    assert {path: path.stat().st_mtime_ns for path in made} == before
