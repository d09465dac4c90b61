"""Lines of Ray's that say nothing to whoever runs a job, kept out of the terminal.

They come from C++ and go to the file descriptor, past Python's logging and `sys.stderr`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOISE = (
    b"has constructor arguments in the object store and max_restarts > 0",  # of every Ray Data pool, whose arguments stay
    b"Cannot deregister autoscaling state",
    b"Failed to determine local IP via external connectivity",  # of a machine without internet, which may be meant
    b"won't accept connections from HAProxy on other nodes",  # an endpoint on loopback has none
)
_END = os.urandom(16).hex().encode()


@contextmanager
def without_noise() -> Iterator[None]:
    """Standard error of this process without NOISE; all else comes as it is, a line at a time."""
    sys.stderr.flush()
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    thread = threading.Thread(target=_copy, args=(reader, terminal), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.write(writer, _END)  # not its closing: a process that was started meanwhile may hold the other end
        thread.join()
        for descriptor in (writer, reader, terminal):
            os.close(descriptor)


def _copy(reader: int, terminal: int) -> None:
    rest, over = b"", False
    while not over:
        said, end, _ = (rest + os.read(reader, 65536)).partition(_END)
        over = bool(end)
        lines = said.splitlines(keepends=True)
        rest = b"" if over or not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        for line in lines:
            if not any(noise in line for noise in NOISE):
                with suppress(OSError):  # nobody reads any more: go on, or the pipe fills and the job stands still
                    os.write(terminal, line)
