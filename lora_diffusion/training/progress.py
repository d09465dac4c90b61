"""How far a piece of work is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from lora_diffusion.training.meter import duration


class Progress:
    """Of `total` `unit`s (a plural). A log gets at most one line every `every` seconds, and the last one. file: default stdout."""

    def __init__(self, total: int, unit: str, every: float = 5.0, file: TextIO | None = None) -> None:
        self.total, self.unit, self.every, self.file = total, unit, every, file or sys.stdout
        self.done = self.failed = 0
        self.start, self._told = time.monotonic(), -math.inf
        self._bar = bar(total, unit, self.file) if total and self.file.isatty() else None

    def add(self, done: int, failed: int = 0) -> None:
        self.done, self.failed = self.done + done, self.failed + failed
        answered, now = self.done + self.failed, time.monotonic()
        if self._bar is not None:
            if self.failed:
                self._bar.set_postfix_str(f"{self.failed:,} failed", refresh=False)
            self._bar.update(done + failed)
            if answered >= self.total:
                self._bar.close()
        elif now - self._told >= self.every or answered >= self.total:
            self._told = now
            print(self.line(), file=self.file, flush=True)

    def line(self) -> str:
        """`12/40 people, 1 failed, 0.50 people/s, 56 s left`."""
        answered = self.done + self.failed
        rate = answered / max(1e-9, self.seconds)
        parts = [f"{answered:,}/{self.total:,} {self.unit}", *([f"{self.failed:,} failed"] if self.failed else [])]
        parts.append(f"{rate:.2f} {self.unit}/s")
        if rate and answered < self.total:
            parts.append(f"{duration((self.total - answered) / rate)} left")
        return ", ".join(parts)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


class Lines:
    """Lines of a training. On a terminal `vae 200/2000  loss 0.71, ...` moves a bar, and is kept if it tells of a validation."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self._bar: Any = None

    def __call__(self, line: str) -> None:
        step = re.fullmatch(r"(\w+) (\d+)/(\d+)  (.*)", line) if self.file.isatty() else None
        if step is None or "validation" in line:
            self.write(line)
        if step is None:
            return
        name, done, total, told = step[1], int(step[2]), int(step[3]), step[4]
        if self._bar is None or self._bar.desc != f"{name}: ":
            self._bar = bar(total, "steps", self.file)
            self._bar.set_description(name, refresh=False)
        self._bar.set_postfix_str(told.partition(", ")[0], refresh=False)
        self._bar.n = done
        self._bar.refresh()
        if done >= total:
            self._bar.close()
            self._bar = None

    def write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.file)
        else:
            print(line, file=self.file, flush=True)


def bar(total: int, unit: str, file: TextIO) -> Any:
    columns = min(shutil.get_terminal_size().columns, 120)
    return tqdm(total=total, unit=f" {unit}", file=file, ncols=columns, mininterval=0.2)
