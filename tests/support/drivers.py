"""A job as a user starts it: a process with a Ray of its own, of which nothing is left at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil


@contextlib.contextmanager
def driver(job: Path, words: Sequence[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(job), *words],
            env={**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", **env},
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where pytest runs in the background
        )
    below: set[psutil.Process] = set()
    over = threading.Event()

    def watch() -> None:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            while not over.wait(0.5):
                below.update(parent.children(recursive=True))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield process
    finally:
        over.set()
        watcher.join()
        process.kill()
        process.wait()
        for child in below:  # Ray's agents survive a driver that was killed
            with contextlib.suppress(psutil.Error):
                child.kill()
