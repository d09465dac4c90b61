"""A Ray as `ray start` makes it, and the endpoint on it, each in processes that end with the block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from http_endpoint import is_ready
from ray.util import get_node_ip_address
from s3_server import free_port
from serve_world import save_synthesizer

from lora_diffusion.endpoint.haproxy import end_haproxy, haproxy_environment

START = 300.0  # seconds for the endpoint to start


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Address, and the process below which all others are. With room for all, and HAProxy before its endpoints."""
    address = f"{get_node_ip_address()}:{free_port()}"  # Ray makes this of 127.0.0.1
    ports = {"port": address.rpartition(":")[2], "min-worker-port": 0, "max-worker-port": 0}
    ports |= {"ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port()}
    options = {
        "num-cpus": 8,
        "object-store-memory": 300_000_000,
        "temp-dir": folder / "ray",
        "include-dashboard": "false",
    }
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        *(f"--{key}={value}" for key, value in {**ports, **options}.items()),
    ]
    (folder / "haproxy").mkdir()
    env = {**os.environ, **haproxy_environment(folder / "haproxy")}
    with started(command, folder / "ray.log", env) as process:
        try:
            yield address, psutil.Process(process.pid)
        finally:
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for child in below:
                with suppress(psutil.Error):
                    child.kill()
            end_haproxy(folder / "haproxy")


@contextmanager
def endpoint(folder: Path, ray: str, words: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Address, and the process of `lora-diffusion serve`, with a random synthesiser."""
    port = free_port()
    model = save_synthesizer(folder / "synthesizer")
    command = ["lora-diffusion", "serve", f"synthesizer={model}", "access.proxies=1", f"port={port}", *words]
    with started([*command, "--ray-address", ray], folder / "serve.log", {**os.environ}) as process:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
        while not is_ready(address):
            assert process.poll() is None, (folder / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()[-3000:]
            time.sleep(1)
        yield address, psutil.Process(process.pid)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)


def heard() -> None:
    """Where a shell runs in the background, Ctrl-C is ignored, and would be by what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command[0] = str(Path(sys.executable).with_name(command[0]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True, preexec_fn=heard
        )
    try:
        yield process
    finally:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
