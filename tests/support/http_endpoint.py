"""The endpoint behind real HTTP on loopback: in one process (`in_process`), or as users start it (`lora_diffusion_serve`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn
from s3_server import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0  # on a busy machine


@contextlib.contextmanager
def in_process(app: Any) -> Iterator[str]:
    """The address of an ASGI application, served by uvicorn in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def lora_diffusion_serve(folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    """The address of `lora-diffusion serve`, at a free port, with a Ray of its own. settings: keys of its configuration."""
    port = free_port()
    words = [f"{key}={value}" for key, value in {**settings, "port": port}.items()]
    log = folder / "serve.log"
    env = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "lora-diffusion"), "serve", *words],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
        )
    family = [psutil.Process(process.pid)]
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        family += family[0].children(recursive=True)
        yield address
    finally:
        with contextlib.suppress(psutil.Error):
            family += family[0].children(recursive=True)
        process.terminate()  # its Ray goes with it, and HAProxy
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for member in set(family):
            with contextlib.suppress(psutil.Error):
                member.kill()
        process.wait()


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False
