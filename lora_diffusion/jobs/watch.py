"""Words while a job waits, and when Ray itself ended under it: the driver would end a minute later, without one of its own.

Light: it imports nothing of Ray, and looks only at one that the job has begun.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LOOK = 1.0  # seconds between two looks
GCS, RAYLET = "Ray's GCS", "the raylet of this machine"
GONE_AFTER = {GCS: 20.0, RAYLET: 3.0}  # seconds: a GCS may be started again
PATIENCE = 10.0  # seconds without a word


@contextmanager
def said_after(seconds: float, line: str) -> Iterator[None]:
    """Print `line` if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, print, (line,), {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watching_ray(job: str) -> Iterator[None]:
    """Inside of the block, the process ends with a sentence and exit code 3 when GCS or raylet are gone."""
    over = threading.Event()
    threading.Thread(target=_watch, args=(job, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(job: str, over: threading.Event) -> None:
    gone: dict[str, float] = {}
    lines: dict[str, socket.socket] = {}
    while not over.wait(LOOK):
        for part, address in _parts().items():
            if part in lines and _is_open(lines[part]):
                continue
            if (line := _connect(address)) is not None:
                lines[part] = line
                gone.pop(part, None)
            elif time.monotonic() - gone.setdefault(part, time.monotonic()) > GONE_AFTER[part] and not over.is_set():
                print(f"{job}: {part} ended: run the same command again", file=sys.stderr, flush=True)
                with suppress(Exception):  # what is left of a Ray of our own
                    _node().kill_all_processes(check_alive=False, allow_graceful=False)
                os._exit(3)


def _node() -> Any:
    return sys.modules["ray"]._private.worker.global_worker.node


def _parts() -> dict[str, tuple[str, int] | str]:
    """Of the Ray that this process is connected to, and where they listen; none while there is none."""
    try:
        node = _node()
        host, _, port = node.gcs_address.rpartition(":")
        raylet = node.raylet_socket_name
    except (AttributeError, KeyError):
        return {}
    return {GCS: (host.strip("[]"), int(port)), **({RAYLET: raylet} if raylet else {})}


def _connect(address: tuple[str, int] | str) -> socket.socket | None:
    """None if nobody listens there. A line is kept open: whoever dies hangs up."""
    line = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    line.settimeout(2)
    try:
        line.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        line.close()
        return None
    except OSError:  # busy, or an address that this machine cannot judge
        pass
    line.setblocking(False)
    return line


def _is_open(line: socket.socket) -> bool:
    try:
        while line.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    line.close()
    return False
