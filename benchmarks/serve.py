"""The endpoint under load: start, latency and its overhead, ten times too much, a killed replica.

    python benchmarks/serve.py                                    # all, about six minutes on two quiet cores
    python benchmarks/serve.py --only start latency --seconds 20 --set synthesizer=runs/tiny/training/synthesizer
    python benchmarks/serve.py --set proxy=ray                    # behind Ray's own proxy instead of HAProxy, as `serve run` is
    python benchmarks/serve.py --set graph=stages                 # a process for each stage

Starts `lora-diffusion serve` on a Ray of its own (port 8000 must be free); the load comes from another process
(benchmarks/load.py). benchmarks/serve_render.py has the figures of the bank. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

ROOT = Path(__file__).resolve().parents[1]
URL = "http://127.0.0.1:8000"
PARTS = ("start", "latency", "overload", "crash")
RATE = 5.0  # requests a second of the latency part
sys.path.insert(0, str(ROOT))


class Server:
    """`lora-diffusion serve`, and everything that it started."""

    def __init__(self, settings: list[str]) -> None:
        self.started = time.perf_counter()
        self.folder = tempfile.TemporaryDirectory(prefix="ray")
        environment = {
            "RAY_ADDRESS": "local",  # never somebody else's Ray
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self.folder.name,
            "OMP_NUM_THREADS": "1",
        }
        self.log = open(Path(self.folder.name) / "serve.log", "wb")  # noqa: SIM115
        command = [str(Path(sys.executable).with_name("lora-diffusion")), "serve", *settings]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=self.log, stderr=self.log
        )

    def wait_until_ready(self, patience: float = 600) -> float:
        """Seconds from the start to the first 200 of /readyz."""
        while time.perf_counter() - self.started < patience:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                if urllib.request.urlopen(f"{URL}/readyz", timeout=10).status == 200:
                    return time.perf_counter() - self.started
            time.sleep(0.1)
        raise SystemExit(f"the server did not start:\n{Path(self.log.name).read_text()[-3000:]}")

    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [
            process for process in children if _title(process).startswith(("ray::Serve", "ray::Proxy", "ray::HAProxy"))
        ]

    def kill(self, deployment: str) -> None:
        victim = next(process for process in self.replicas() if f":{deployment}" in _title(process))
        victim.send_signal(signal.SIGKILL)

    def megabytes(self) -> float:
        """Unique memory of the replicas and Ray's proxy actors together; not of HAProxy's own process."""
        total = 0
        for process in self.replicas():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().uss
        return total / 1e6

    def stop(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in below:  # HAProxy may outlive the Ray that started it, and hold the port
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.log.close()
        self.folder.cleanup()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def load(**options: Any) -> Iterator[dict[str, Any]]:
    """benchmarks/load.py beside the block; its report is in the dict when the block is left."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/load.py"), URL, *words], stdout=subprocess.PIPE, text=True
    )
    report: dict[str, Any] = {}
    try:
        yield report
        report |= json.loads(process.communicate()[0])
    finally:
        process.kill()


def run_load(**options: Any) -> dict[str, Any]:
    with load(**options) as report:
        pass
    return report


def bare(settings: list[str], rate: float, repeats: int = 120) -> dict[str, float]:
    """The same work without Serve and HTTP, ms: load the photo, find the face, sample, decode, write the file.

    `rate`: calls a second, as many as the server is asked for: after a pause each takes some milliseconds more than one
    right after the other, with or without Serve. 0: without a pause.
    """
    import torch

    from lora_diffusion.config import load_config
    from lora_diffusion.lora import formats
    from lora_diffusion.serving.config import ServeConfig
    from lora_diffusion.serving.faces import FaceStage
    from lora_diffusion.serving.latents import LatentStage, VectorStage
    from lora_diffusion.serving.messages import DecodeTask, LatentTask

    torch.set_num_threads(1)
    ours = [word for word in settings if not word.startswith("proxy=")]  # a key of the command
    config = load_config(ServeConfig, ROOT / "configs/serve_tiny.yaml", ours)
    faces, latents, vectors = FaceStage(config), LatentStage(config), VectorStage(config)
    photos = [path.read_bytes() for path in sorted((ROOT / "tests/data/faces").glob("*.png"))]
    sampling, times = config.sampling, []
    for number in range(repeats):
        begin = time.perf_counter()
        found: Any = faces([photos[number % len(photos)]])[0]
        embedding_C = found.faces[0].embedding_C
        task = LatentTask(embedding_C, number)
        code: Any = latents([task])[0]
        vector_N: Any = vectors([DecodeTask(code, sampling.deviation_scale)])[0]
        formats.to_bytes(vector_N, vectors.layout, "diffusers")
        times.append(time.perf_counter() - begin)
        if rate:
            time.sleep(max(0.0, 1 / rate - times[-1]))
    return {f"p{q}": round(float(np.percentile(times[20:], q)) * 1000, 1) for q in (50, 99)}


def overload(server: Server, seconds: float) -> dict[str, Any]:
    """Ten times what it can do; memory meanwhile; and how soon it is itself again."""
    capacity = run_load(route="loras", closed=8, seconds=15)["success_per_second"]
    calm = run_load(route="loras", rate=max(1.0, capacity / 2), seconds=10)
    before, during = server.megabytes(), []
    with load(route="loras", rate=10 * capacity, seconds=seconds) as flood:
        for _ in range(int(seconds)):
            time.sleep(1)
            during.append(server.megabytes())
    started, recovered = time.perf_counter(), None
    while recovered is None and time.perf_counter() - started < 60:
        after = run_load(route="loras", rate=max(1.0, capacity / 2), seconds=3)
        if set(after["statuses"]) == {"200"} and after["latency_ms"]["p50"] < 1.5 * calm["latency_ms"]["p50"]:
            recovered = time.perf_counter() - started
    return {
        "capacity_per_second": capacity,
        "flood": flood,
        "calm_latency_ms": calm["latency_ms"],
        "megabytes": {"before": before, "largest": max(during), "after": server.megabytes()},
        "seconds_to_full_speed_at_most": recovered,
    }


def crash(server: Server, deployment: str, route: str) -> dict[str, Any]:
    timer = threading.Timer(8, server.kill, [deployment])
    timer.start()
    report = run_load(route=route, rate=2, seconds=30)
    server.wait_until_ready()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of the latency and the overload part")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="keys of configs/serve_tiny.yaml")
    parser.add_argument("--name", default="serve")
    args = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if key.startswith("RAY_SERVE_")}
    result: dict[str, Any] = {"settings": args.set, "environment": environment}
    if "latency" in args.only:
        result["bare_without_pause_ms"] = bare(args.set, 0)
        result["bare_ms"] = bare(args.set, RATE)
    server = Server(args.set)
    try:
        result["seconds_to_ready"] = round(server.wait_until_ready(), 1)
        run_load(route="personalize", rate=1, seconds=5)  # whatever is done once is done
        if "latency" in args.only:
            result["photo_to_lora_at_5_per_second"] = run_load(route="loras", rate=RATE, seconds=args.seconds)
            p50 = result["photo_to_lora_at_5_per_second"]["latency_ms"]["p50"]
            result["overhead_ms_p50"] = round(p50 - result["bare_ms"]["p50"], 1)
        if "overload" in args.only:
            result["overload"] = overload(server, args.seconds)
        if "crash" in args.only:
            result["crash"] = {
                "renderer": crash(server, "Renderer", "personalize"),
                "gateway": crash(server, "Gateway", "loras"),
            }
    finally:
        server.stop()
    print(json.dumps(result, indent=2))
    print(write_result(args.name, result))


if __name__ == "__main__":
    main()
