"""A whole job on a Ray of its own, of which one part is killed: what it says, and what the same command makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from drivers import driver
from factory_world import make_world, settings

from lora_diffusion.corpus import CorpusReader

JOBS = Path(__file__).parents[2] / "jobs"
# a part of a job -> the word in its command line, and the exit code that follows
PARTS = {
    "ledger": ("ray::InMemoryAttempts", 3),
    "raylet": ("raylet/raylet", 3),
    "fine-tuning worker": ("MapBatches(Make)", 0),
    "GCS": ("gcs_server", 3),
    "driver": ("", -9),
    "embedding worker": ("MapBatches(Embed)", 0),
    "agent": ("ray::RuntimeEnvAgent", 3),
    "scoring worker": ("MapBatches(Score)", 0),
}
MEMORY = "a worker, since memory runs out"  # another part: Ray chooses which
HOG = """
import time
kept = []
while True:
    kept.append(bytearray(b"x" * 64_000_000))
    time.sleep(0.05)
"""


def outcome(place: Path) -> dict[str, Any]:
    """All of a corpus but the seconds that it took."""
    reader = CorpusReader(place)
    infos, problems = reader.verify()
    assert not problems
    assert len(infos) == len(reader.plan.shards)
    table = reader.table()
    rows = table.drop_columns([name for name in table.column_names if name.endswith("_seconds")]).to_pylist()
    there = [row["identity"] for row in rows] + [f.identity for f in reader.failures() if f.photo is None]
    return {
        "everybody": sorted(there),
        "rows": str(rows),  # NaN equals itself in text
        "vectors": reader.vectors().tobytes(),
        "statistics": reader.store.read("statistics.safetensors"),
        "counts": reader.manifest.counts,
        "left": sorted(reader.store.files()),
    }


def prepare(folder: Path) -> list[str]:
    """A world in `folder`; the words of the command but for the output."""
    folder.mkdir(parents=True)
    make_world(folder)
    values = {**settings(folder), "people": str(folder / "people"), "output": "nowhere"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(folder / "config.yaml")]


def run(
    job: str, words: list[str], log: Path, part: str = "", ready: Callable[[], bool] = lambda: True
) -> tuple[int, str, float]:
    """Exit code, last line, and seconds from the kill to the end. `part` is killed once it is there and `ready` says so.

    Exit code 99: it was done before.
    """
    limit, env = round(psutil.virtual_memory().percent / 100 + 0.2, 2), {}
    if part == MEMORY:  # Ray's own limit, above what is used now
        env = {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
    with driver(JOBS / f"{job}.py", words, env, log) as process:
        killed = not part
        while process.poll() is None and not killed:
            time.sleep(0.05)
            if ready():
                killed = _starve(process, limit) if part == MEMORY else _kill(process.pid, part)
        begin = time.monotonic()
        code = process.wait(timeout=900)
    lines = log.read_text(errors="replace").strip().splitlines()
    return (code if killed else 99), (lines or [""])[-1], time.monotonic() - begin


def _kill(pid: int, part: str) -> bool:
    word = PARTS[part][0]
    with suppress(psutil.Error):
        whole = psutil.Process(pid)
        for found in whole.children(recursive=True) if word else [whole]:
            with suppress(psutil.Error):
                title = " ".join(found.cmdline())
                if word in title and "IDLE" not in title:
                    found.kill()
                    return True
    return False


def _starve(driver: subprocess.Popen[bytes], limit: float) -> bool:
    """Another program takes memory until Ray ends one of the job's workers; False if none was there, or the job was over."""
    with subprocess.Popen([sys.executable, "-c", HOG]) as hog:
        try:
            workers = _workers(driver.pid)
            while workers and driver.poll() is None:
                time.sleep(0.02)
                used, now = psutil.virtual_memory().percent / 100, _workers(driver.pid)
                if workers - now and used > limit - 0.02:
                    return True
                workers = now
        finally:
            hog.kill()
    return False


def _workers(pid: int) -> set[int]:
    found = set()
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and "IDLE" not in title:
                    found.add(process.pid)
    return found
