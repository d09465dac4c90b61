"""Progress as a person sees it: a bar on a terminal, lines in a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest

from lora_diffusion.training.progress import Lines, Progress


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """What is written to the first can be read at the second."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    with os.fdopen(inner, "w") as file:
        yield file, outer
    os.close(outer)


def shown_on(file: io.TextIOWrapper, outer: int) -> str:
    print("the end", file=file, flush=True)
    shown = b""
    while not shown.endswith(b"the end\r\n"):  # what is written comes in pieces
        shown += os.read(outer, 100_000)
    return shown.decode().removesuffix("the end\r\n")


def test_a_log_gets_lines_and_always_the_last_one() -> None:
    log = io.StringIO()
    progress = Progress(40, "people", every=1000, file=log)
    for i in range(20):
        progress.add(1, int(i == 3))
    progress.add(19)
    first, last = log.getvalue().splitlines()
    assert first.startswith("1/40 people, ")
    assert first.endswith(" left")
    assert last.startswith("40/40 people, 1 failed, ")
    assert "left" not in last
    assert "\r" not in log.getvalue()


def test_a_terminal_gets_a_bar(terminal: tuple[io.TextIOWrapper, int]) -> None:
    file, outer = terminal
    progress = Progress(4, "people", file=file)
    progress.add(3)
    progress.add(0, 1)
    shown = shown_on(file, outer)
    assert "0/4 [" in shown
    assert "4/4 [" in shown
    assert "1 failed" in shown
    assert shown.count("\n") == 1


def test_steps_of_a_training_move_a_bar_and_what_is_worth_keeping_stays(terminal: tuple[io.TextIOWrapper, int]) -> None:
    said = ["pca: 12 rows", "vae 5/20  loss 0.5, 3 s left", "vae 10/20  loss 0.4, validation 0.7, 2 s left", "vae 20/20  loss 0.3, 0 s left",
            "synthesiser: x"]  # fmt: skip
    file, outer = terminal
    show, log = Lines(file), io.StringIO()
    plain = Lines(log)
    for line in said:
        show(line)
        plain(line)
    shown = shown_on(file, outer)
    for part in (said[0], said[2], said[4], "vae: ", " 5/20 [", "20/20 [", "loss 0.3"):
        assert part in shown
    assert said[1] not in shown
    assert log.getvalue().splitlines() == said
