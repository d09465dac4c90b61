"""Rounds of chaos.py in which the clock jumps by a day, forwards and backwards, under driver and workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tally import contents

if TYPE_CHECKING:
    from chaos import Chaos

SOURCE = Path(__file__).parents[1] / "support" / "jumping_clock.c"
CC = shutil.which("cc")
OFFSETS = (-86_400, 86_400, -3_600, 0)  # seconds


@contextmanager
def jumping(chaos: Chaos, offsets: tuple[int, ...] = OFFSETS) -> Iterator[dict[str, str]]:
    """Variables under which the wall clock jumps several times a second; the monotonic one goes on as it does on a real machine."""
    file, library, over = chaos.folder / "clock", chaos.folder / "clock.so", threading.Event()
    subprocess.run([str(CC), "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)

    def jump() -> None:
        while not over.is_set():
            (chaos.folder / "clock.new").write_text(str(chaos.random.choice(offsets)))
            os.replace(chaos.folder / "clock.new", file)
            over.wait(chaos.random.uniform(0.1, 0.5))

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield {**os.environ, "LD_PRELOAD": str(library), "JUMPING_CLOCK": str(file)}
    finally:
        over.set()
        thread.join()


def command(uri: str) -> list[str]:
    """Makes victims.py's corpus there."""
    return [sys.executable, str(Path(__file__).with_name("victims.py")), uri]


def round_of(chaos: Chaos) -> None:
    """A corpus, whose driver is killed once; a second driver is refused while it lives, whatever the clocks say."""
    uri, tally = str(chaos.new("clock")), chaos.tallies["clock"]
    log = chaos.folder / "log"
    with jumping(chaos) as env:
        begin = time.monotonic()
        with log.open("wb") as output:
            first = subprocess.Popen(command(uri), env=env, stdout=output, stderr=output)
        while first.poll() is None and not Path(uri, "claim.json").exists():
            time.sleep(0.05)
        second = subprocess.run(command(uri), env=env, capture_output=True, text=True)
        if first.poll() is None:
            assert second.returncode == 1, second.stderr
            assert "works on" in second.stderr, second.stderr
        first.kill()
        first.wait()
        tally.kill("driver", time.monotonic() - begin, len(contents(uri)))
        done = subprocess.run(command(uri), env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    chaos.compare("clock", uri, chaos.calm)
