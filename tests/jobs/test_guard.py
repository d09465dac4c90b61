"""The process that a shell waits for: exit codes, signals, and a driver that Ray ends from inside."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = """
import atexit, os, signal, sys, time
from lora_diffusion.jobs.guard import guarded

def work():
    {body}

sys.exit(guarded("corpus", work))
"""
WAITS = """
    try:
        print(os.getpid(), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)  # a second ^C would end it here
        return 130
"""


def start(body: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body.strip())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest runs in the background
        **options,
    )


def wait_until(said: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not said():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('corpus: refused')", 1, "corpus: refused"),
        ("raise KeyError('ours')", 1, "KeyError: 'ours'"),
        ("os._exit(1)  # as Ray does", 3, "corpus: a part of Ray ended, and the job with it: run the same command again"),
        ("print('corpus: the raylet of this machine ended', file=sys.stderr, flush=True); os._exit(3)", 3, "corpus: the raylet of this machine ended"),
        ("atexit.register(os.kill, os.getpid(), signal.SIGSEGV); return 0  # its work was done", 0, ""),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "corpus: ended by signal 11: run the same command again"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            -9,
            "corpus: ended by signal 9, as a machine does that has no memory left: run the same command again",
        ),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_drivers_and_its_end_is_never_silent(body: str, code: int, last: str) -> None:
    process = start(body)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert (said.strip().splitlines() or [""])[-1] == last


def test_what_the_driver_leaves_behind_holds_nobody_up() -> None:
    process = start("os.fork() or time.sleep(20); os._exit(1)")
    assert process.wait(10) == 3


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_reaches_the_driver_once(sent: signal.Signals, code: int) -> None:
    with start(WAITS) as process:
        assert process.stdout is not None
        driver = psutil.Process(int(process.stdout.readline()))
        process.send_signal(sent)
        assert process.wait(30) == code
        assert not driver.is_running()


def test_a_signal_to_the_group_reaches_the_driver_once() -> None:
    """As of `timeout`, or a terminal."""
    with start(WAITS, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130


def test_a_job_that_is_stopped_rests_and_goes_on() -> None:
    with start(WAITS) as process:
        assert process.stdout is not None
        driver = psutil.Process(int(process.stdout.readline()))
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: driver.status() == psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: driver.status() == psutil.STATUS_SLEEPING)
        process.kill()


def test_the_driver_does_not_outlive_its_parent() -> None:
    with start(WAITS) as process:
        assert process.stdout is not None
        driver = psutil.Process(int(process.stdout.readline()))
        process.kill()
        driver.wait(30)


def test_ctrl_c_at_a_terminal_interrupts_the_driver_once(tmp_path: Path) -> None:
    """The terminal sends it to both processes."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(body=WAITS.strip()))
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, str(script)])
    said = b""
    while b"\n" not in said:
        said += os.read(terminal, 100)
    time.sleep(0.2)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
