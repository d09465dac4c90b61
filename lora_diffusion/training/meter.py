"""Sums between two reports of a training, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.training.distributed import Group


class Meter:
    """One for each run of a loop. `step`: where it begins."""

    def __init__(self, step: int) -> None:
        self.first, self.start = step, time.monotonic()
        self.sums: dict[str, Tensor] = {}
        self.rows = self.all_rows = 0
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    def add(self, sums: dict[str, Tensor], rows: int) -> None:
        """Sums over this worker's rows, of `rows` that all workers had. No value is read: the device runs on."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.rows += rows
        self.all_rows += rows

    def means(self, group: Group) -> dict[str, float]:
        """Means over all rows of all workers since the last call."""
        import torch

        names = sorted(self.sums)
        total = group.sum(torch.stack([self.sums[name].double().cpu() for name in names]))
        means = {name: float(value) / self.rows for name, value in zip(names, total, strict=True)}
        self.sums, self.rows = {}, 0
        return means

    def speed(self, step: int, steps: int) -> dict[str, float]:
        """Rows of all workers a second, seconds to the end, share of the time that was spent waiting for data."""
        seconds = max(1e-9, time.monotonic() - self.start)
        return {
            "rows_per_second": round(self.all_rows / seconds, 2),
            "seconds_left": round(seconds / max(1, step - self.first) * (steps - step), 1),
            "waiting_for_data": round(self.waited / seconds, 4),
        }


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def in_bytes(number: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
