"""The soak of a minute: corpus, training and serving side by side, with faults; and that growth is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import measure
import numpy as np
import psutil
import pytest

LEAK = """
import sys
kept = []
for _ in sys.stdin:
    kept.append((bytearray(b"x" * 1_000_000), open("/dev/null")))
    print(flush=True)
"""


def test_slopes_are_an_hour_and_do_not_follow_outliers() -> None:
    hours = np.linspace(0, 1, 100)
    values = 100 + 5 * hours
    values[::10] += 1000
    assert measure.slope(hours, values) == pytest.approx(5, abs=0.5)


def test_a_process_that_keeps_memory_and_files_is_noticed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        recorder = measure.Recorder(lambda: [("leak", psutil.Process(process.pid))], {"folder": tmp_path})
        for _ in range(10):
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            recorder.look()
            time.sleep(0.05)
        process.stdin.close()
    found = measure.too_steep(recorder.slopes(0))
    assert [sentence.partition(": ")[2].split()[1] for sentence in found] == ["MB", "files"]
    assert all(sentence.startswith("leak (") for sentence in found)
    assert "| folder |" in measure.table(recorder.slopes(0))


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_at_once_with_faults_gives_no_wrong_answer(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("soak.py")),
        "--seconds",
        "45",
        f"--out={tmp_path}/soak.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["wrong"] == []
    assert sum(found["answers"].values()) > 5
    looked_at = " ".join(row["what"] for row in found["slopes"])
    for name in (
        "Gateway",
        "Embedder",
        "Denoiser",
        "Decoder",
        "Renderer",
        "Library",
        "raylet",
        "GCS",
        "controller",
        "serve run",
    ):
        assert name in looked_at
