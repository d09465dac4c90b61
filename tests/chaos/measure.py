"""Memory, open files and threads of processes that live long, and how fast they grow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

# word in the command line -> how the process is called
NAMES = {
    "ServeReplica:lora-diffusion:": "replica",
    "ServeController": "Serve's controller",
    "HAProxyManager": "HAProxy's manager",
    "ProxyActor": "Serve's proxy",
    "haproxy": "HAProxy",
    "raylet/raylet": "raylet",
    "gcs_server": "GCS",
    "dashboard/agent": "Ray's dashboard agent",
    "runtime_env/agent": "Ray's environment agent",
    "log_monitor": "Ray's log monitor",
    "monitor.py": "Ray's monitor",
}
COLUMNS = ("MB", "PSS MB", "files", "threads", "CPU s")
BOUNDS = {"MB": 12.0, "files": 10.0, "threads": 10.0, "count": 10.0}  # an hour; PSS grows when others end who shared it
RAYS = ("Ray's log monitor", "files of Ray's logs")  # a log for each worker that was begun


def name_of(process: psutil.Process) -> str:
    """Empty for processes that come and go."""
    title = " ".join(process.cmdline())
    for word, name in NAMES.items():
        if word in title:
            return title.partition(word)[2].split()[0] if name == "replica" else name
    return ""


def sample(process: psutil.Process) -> tuple[float, ...]:
    memory, cpu = process.memory_full_info(), process.cpu_times()
    return memory.rss / 2**20, memory.pss / 2**20, process.num_fds(), process.num_threads(), cpu.user + cpu.system


def slope(hours: np.ndarray, values: np.ndarray) -> float:
    """Theil-Sen: the median of the slopes between all pairs, an hour."""
    first, second = np.triu_indices(len(hours), 1)
    return float(np.median((values[second] - values[first]) / (hours[second] - hours[first])))


@dataclass
class Series:
    seconds: list[float] = field(default_factory=list)
    values: list[tuple[float, ...]] = field(default_factory=list)


class Recorder:
    """Of the processes that `family` names, and of counts, each time that `look` is called."""

    def __init__(self, family: Callable[[], Iterable[tuple[str, psutil.Process]]], counts: dict[str, Path]) -> None:
        self.family, self.counts = family, counts
        self.begin = time.monotonic()
        self.processes: dict[tuple[str, int], Series] = {}
        self.folders: dict[str, Series] = {name: Series() for name in [*counts, "processes"]}

    def look(self) -> None:
        now, alive = time.monotonic() - self.begin, 0
        for name, process in self.family():
            with suppress(psutil.Error):
                alive += process.status() != psutil.STATUS_ZOMBIE
                if name:
                    self._add(self.processes.setdefault((name, process.pid), Series()), now, sample(process))
        for name, path in self.counts.items():
            self._add(self.folders[name], now, (float(sum(len(files) for _, _, files in os.walk(path))),))
        self._add(self.folders["processes"], now, (float(alive),))

    @staticmethod
    def _add(series: Series, now: float, values: tuple[float, ...]) -> None:
        series.seconds.append(now)
        series.values.append(values)

    def slopes(self, warm: float) -> list[dict[str, Any]]:
        """Of all that lived for at least half of the time after `warm` seconds: last values, and slopes an hour."""
        rows, whole = [], time.monotonic() - self.begin - warm
        every = {f"{name} ({pid})": (series, COLUMNS) for (name, pid), series in self.processes.items()}
        every |= {name: (series, ("count",)) for name, series in self.folders.items()}
        for name, (series, columns) in sorted(every.items()):
            seconds = np.array(series.seconds)
            later = seconds >= max(warm, seconds[0] + warm / 2)  # also of one that was begun meanwhile
            if later.sum() < 3 or seconds[later][-1] - seconds[later][0] < whole / 2:
                continue
            values, row = (
                np.array(series.values)[later],
                {"what": name, "minutes": round(np.ptp(seconds[later]) / 60, 1)},
            )
            for i, column in enumerate(columns):
                row[column] = [round(float(values[-1, i]), 1), round(slope(seconds[later] / 3600, values[:, i]), 2)]
            rows.append(row)
        return rows


def too_steep(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['what']}: {row[column][1]:+g} {column} an hour, and {bound:g} are allowed"
        for row in rows
        for column, bound in BOUNDS.items()
        if column in row and row[column][1] > bound and not row["what"].startswith(RAYS)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| what | minutes | RSS, MB | an hour | PSS, MB | an hour | open files | an hour | threads | an hour | CPU, s | an hour |"
    ]
    lines.append("|---" * 12 + "|")
    for row in rows:
        numbers = [f"{last:g} | {each:+g}" for last, each in (row[c] for c in COLUMNS if c in row)]
        if "count" in row:
            numbers = [f"{row['count'][0]:g} | {row['count'][1]:+g}"]
        lines.append(f"| {row['what']} | {row['minutes']:g} | {' | '.join(numbers)} |")
    return "\n".join(lines)
