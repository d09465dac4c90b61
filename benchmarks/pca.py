"""PCA of a corpus that would not fit into memory: time, peak memory, and how far the components are from the exact ones.

    python benchmarks/pca.py                                    # 10,000 × 99,648, 512 components: writes results/pca.json
    python benchmarks/pca.py --rows 1000 --columns 20000 --components 64 --exact-rows 200

The rows lie on disk as float16, as a training's cache holds them, and are of known rank with known variances. A process
of its own fits them in chunks; its peak of private memory (what the pages of the file are not) is what has to fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lora_diffusion.synthesis.pca import fit_pca_distributed
from lora_diffusion.synthesis.training.passes import passes
from lora_diffusion.training.distributed import Group

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

CHUNK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--columns", type=int, default=99_648)
    parser.add_argument("--components", type=int, default=512)
    parser.add_argument("--rank", type=int, default=256, help="of the made-up corpus, beside its noise")
    parser.add_argument("--exact-rows", type=int, default=4096, help="from here on randomised")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--fit", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit is not None:
        print(json.dumps(fit(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.bin"
        expected = write_rows(path, args.rows, args.columns, args.rank)
        start = time.perf_counter()
        done, memory = watched([sys.executable, __file__, *sys.argv[1:], "--fit", str(path)])
        found = json.loads(done)
        count = min(10, args.rank, len(found["variances"]))
        errors = np.abs(np.array(found["variances"][:count]) / expected[:count] - 1)
        result = {
            **{name: getattr(args, name) for name in ("rows", "columns", "components", "rank", "iterations")},
            "kind": "exact" if args.rows <= args.exact_rows else "randomised",
            "file_gb": round(path.stat().st_size / 1e9, 3),
            "float32_gb": round(args.rows * args.columns * 4 / 1e9, 3),
            "peak_private_gb": round(memory, 3),
            "process_seconds": round(time.perf_counter() - start, 1),
            "fit_seconds": round(found["seconds"], 1),
            "share_explained": found["share"],
            # the sample's own variances differ from those it was drawn with by about sqrt(2 / rows)
            "relative_error_of_first_10_variances": round(float(errors.max()), 5),
        }
    print(json.dumps(result, indent=2))
    print("written:", write_result("pca", result))


def write_rows(path: Path, rows: int, columns: int, rank: int) -> np.ndarray:
    """Rows with variances that fall as 1/k along `rank` directions, and noise; returns those variances."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((columns, rank), dtype=np.float32))[0].T
    variances = columns * 0.5 / np.arange(1, rank + 1) / np.log(rank + 1)
    noise = 0.1
    table = np.memmap(path, np.float16, "w+", shape=(rows, columns))
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        weights = rng.standard_normal((count, rank), dtype=np.float32) * np.sqrt(variances, dtype=np.float32)
        table[start : start + count] = weights @ basis + noise * rng.standard_normal((count, columns), dtype=np.float32)
    table.flush()
    return variances + noise**2


def fit(args: argparse.Namespace) -> dict[str, Any]:
    table = np.memmap(args.fit, np.float16, "r", shape=(args.rows, args.columns))
    start = time.perf_counter()
    run = passes(Group(), np.arange(args.rows), lambda slots: np.asarray(table[slots], np.float32), CHUNK)
    pca = fit_pca_distributed(run, args.components, exact_rows=args.exact_rows, iterations=args.iterations)
    return {
        "seconds": time.perf_counter() - start,
        "share": pca.curve()[-1],
        "variances": pca.explained_variance_K.tolist(),
    }


def watched(command: list[str]) -> tuple[str, float]:
    """What the command prints, and the peak of its private memory in GB, looked at ten times a second."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.1):
            try:
                peak = max(peak, psutil.Process(process.pid).memory_full_info().uss / 1e9)
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    text, _ = process.communicate()
    over.set()
    thread.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return text, peak


if __name__ == "__main__":
    main()
