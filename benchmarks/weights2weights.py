#!/usr/bin/env python
"""The published corpus of weights2weights through the real import: seconds and memory, then the same command again.

    python benchmarks/weights2weights.py                     # 5,000 and 20,000 rows of 99,648; 12 GB of disk at once
    python benchmarks/weights2weights.py --rows 1000

Rows are invented: low rank and noise. Memory is what each process has for itself (USS): the largest of the driver and of the
workers. Writes benchmarks/results/weights2weights.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result
from corpus_growth import ROOT, WatchedMemory, run, timed

from lora_diffusion.corpus import CorpusReader

N = 99_648


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000])
    args = parser.parse_args()
    rows = []
    for count in args.rows:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            rows.append(measure(Path(folder), count))
            print(rows[-1], flush=True)
    print("written:", write_result("weights2weights", {"columns": N, "dtype": "float32", "runs": rows}))


def measure(folder: Path, count: int) -> dict[str, Any]:
    invent(folder, count)
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "jobs" / "import_weights2weights.py"),
        f"{folder}/all_weights.pt",
    ]
    command += [f"embeddings={folder}/faces.npy", f"output={folder}/corpus"]
    row: dict[str, Any] = {"rows": count, "gigabytes": round((folder / "all_weights.pt").stat().st_size / 1e9, 2)}
    with WatchedMemory("MapBatches(Import)") as workers, WatchedMemory("import_weights2weights.py") as driver:
        row["seconds"] = round(timed(lambda: run(command)), 1)
    row["worker_peak_mb"], row["driver_peak_mb"] = round(max(workers.samples)), round(max(driver.samples))
    row["again_seconds"] = round(timed(lambda: run(command)), 1)
    row["corpus_gigabytes"] = round(
        sum(p.stat().st_size for p in (folder / "corpus").rglob("*") if p.is_file()) / 1e9, 2
    )
    assert len(CorpusReader(folder / "corpus")) == count
    return row


def invent(folder: Path, count: int) -> None:
    """all_weights.pt and faces.npy, written without holding them. Every row is its own, and follows its face."""
    generator = torch.Generator().manual_seed(0)
    noise_AN = 0.01 * torch.randn(100, N, generator=generator)
    faces_ME = torch.nn.functional.normalize(torch.randn(count, 512, generator=generator), dim=1)
    basis_EN = 0.002 * torch.randn(512, 32, generator=generator) @ torch.randn(32, N, generator=generator)
    raw = folder / "raw.bin"
    rows_MN = torch.from_file(str(raw), shared=True, size=count * N).view(count, N)
    for start in range(0, count, len(noise_AN)):
        some = slice(start, start + len(noise_AN))
        rows_MN[some] = faces_ME[some] @ basis_EN + noise_AN[: len(faces_ME[some])].roll(start, 1)
    torch.save(rows_MN, folder / "all_weights.pt")
    raw.unlink()
    np.save(folder / "faces.npy", faces_ME.numpy())


if __name__ == "__main__":
    main()
