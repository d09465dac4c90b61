"""Training at production size: what share of a step waits for data, and how much memory a worker takes.

    python benchmarks/training.py                              # 2,000 LoRAs of 99,648 numbers in a local S3, four minutes
    python benchmarks/training.py --rows 200 --columns 20000

A made-up corpus is written into SeaweedFS; `jobs/train.py stage=vae` streams it from there into its cache on the local disk,
once, and reads batches from that. One worker, with the VAE of configs/train_sd15.yaml made narrower (--hidden), since two
cores would take a minute for a step of the whole one. `waiting_for_data` is the share of the steps' time after the cache was
filled; `seconds_to_fill` is what came before the first step: Ray's start, and the stream. Writes results/training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from common import write_result
from low_rank_corpus import write_corpus
from s3_server import BUCKET, new_server, running

from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=99_648)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    half = args.columns // 2
    layout = LoRALayout.from_shapes(
        {"a.to_q": (half, args.columns - half)}, rank=1, alpha=1.0, target_modules=("to_q",)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with running(new_server(), folder / "s3"):
            corpus, output = (f"s3://{BUCKET}/{part}" for part in ("corpus", "run"))
            write_corpus(open_store(corpus), args.rows, layout, dtype="float16")
            words = {
                "corpus": corpus,
                "output": output,
                "stage": "vae",
                "start_from_pca": "false",
                "data.cache": str(folder / "cache"),
                "vae.hidden": str(args.hidden),
                "vae_training.batch_size": args.batch_size,
                "vae_training.steps": args.steps,
                "vae_training.log_every": 10,
                "vae_training.validate_every": args.steps,
                "vae_training.checkpoint_every": args.steps,
                "workers.use_gpu": "false",
                "workers.max_workers": "null",
                "workers.cpus": 2,
                "tensorboard": "false",
            }
            command = [
                sys.executable,
                "jobs/train.py",
                "configs/train_sd15.yaml",
                *(f"{k}={v}" for k, v in words.items()),
            ]
            began = time.perf_counter()
            worker_gb, driver_gb = watched(command)
            seconds = time.perf_counter() - began
            lines = [line for line in read_metrics(open_store(output)) if "waiting_for_data" in line]
    last = lines[-1]
    steps_seconds = args.steps * min(args.batch_size, args.rows) / last["rows_per_second"]
    result = {
        **{name: getattr(args, name) for name in ("rows", "columns", "hidden", "batch_size", "steps")},
        "float16_gb": round(args.rows * args.columns * 2 / 1e9, 3),
        "seconds_in_all": round(seconds, 1),
        "seconds_to_fill": round(seconds - steps_seconds, 1),
        "rows_per_second": last["rows_per_second"],
        "waiting_for_data": last["waiting_for_data"],
        "worker_peak_private_gb": round(worker_gb, 3),
        "driver_peak_private_gb": round(driver_gb, 3),
    }
    print(result)
    print(write_result("training", result))


def watched(command: list[str]) -> tuple[float, float]:
    """Run it; peaks of private memory, GB, of the training worker and of the driver."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    worker = driver = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            driver = max(driver, psutil.Process(process.pid).memory_full_info().uss / 1e9)
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(child.cmdline()):
                        worker = max(worker, child.memory_full_info().uss / 1e9)
        time.sleep(0.3)
    if process.returncode:
        raise SystemExit(f"the training ended with {process.returncode}")
    return worker, driver


if __name__ == "__main__":
    main()
