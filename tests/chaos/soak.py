"""Corpus, training and serving side by side for an hour, with faults all the time: is an answer wrong, does anything grow?

    python tests/chaos/soak.py --seconds 3600 --seed 0

One Ray holds the endpoint (each stage in processes of its own), which a client asks all the time, and one job after the other,
on an S3 server that throttles, fails, hangs and cuts. A worker of each job is killed, now and then a younger replica of a stage or
the S3 server. Beside it one process makes corpora and trains, over and over (steady.py). Every ten seconds memory, files and
threads of each process that lives long are looked at. Exit code 1: an answer was wrong, or something grew by more than BOUNDS of
measure.py an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import measure  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402
from clients import Client  # noqa: E402
from drivers import driver  # noqa: E402
from low_rank_corpus import write_corpus  # noqa: E402
from s3_faults import faulty  # noqa: E402
from s3_server import BUCKET, Weed, new_server, running  # noqa: E402
from victims import TRAINING  # noqa: E402
from whole_cluster import cluster, endpoint, heard  # noqa: E402
from whole_job import outcome, prepare  # noqa: E402

from lora_diffusion.storage import open_store  # noqa: E402

ROOT = Path(__file__).parents[2]
FAULTS = {"throttled": 0.02, "failed": 0.01, "refused": 0.02, "hung": 0.005, "cut": 0.02}
STAGES = ("Embedder", "Renderer")  # two replicas of each
SHORT = 1200  # seconds: in less a process does not come to rest
EVERY = 10.0  # seconds from look to look
KILL_EVERY = (60.0, 180.0)  # seconds from one replica's or server's death to the next
REST = 30.0  # seconds between two jobs


class Soak:
    def __init__(self, folder: Path, seed: int, weed: Weed) -> None:
        self.folder, self.weed, self.random = folder, weed, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.jobs: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over, self.stopped = threading.Event(), threading.Event()
        self.ray = psutil.Process()  # above all of Ray's
        self.others: dict[str, psutil.Process] = {}
        self._expected: dict[str, Any] = {}

    # --- what runs

    def ask(self, client: Client) -> None:
        while not self.over.is_set():
            client.ask()
            self.over.wait(self.random.uniform(0.5, 2.5))

    def work(self, ray: str) -> None:
        """A corpus job and a training in turn; of each but the first a worker is killed, now and then the driver."""
        words = {
            "build_corpus": prepare(self.folder / "world"),
            "train": ["--config", str(self.folder / "train.yaml"), f"corpus=s3://{BUCKET}/vectors", "data.cache="],
        }
        write_corpus(open_store(f"s3://{BUCKET}/vectors"), 40)
        (self.folder / "train.yaml").write_text(yaml.safe_dump({**TRAINING, "workers": {"num_workers": 1, "cpus": 1}}))
        number = 0
        while not self.over.is_set():
            for job in words:
                uri = f"s3://{BUCKET}/{job}-{number}"
                self._job(job, [*words[job], f"output={uri}", "--ray-address", ray], kill=number > 0)
                if self.over.is_set():
                    return
                self._compare(job, uri)
                self.over.wait(REST)
            number += 1

    def _job(self, job: str, words: list[str], kill: bool) -> None:
        """The same command until it is done."""
        log = self.folder / f"{job}.log"
        for _ in range(10):
            with driver(ROOT / "jobs" / f"{job}.py", words, {}, log) as process:
                if kill:
                    self._kill_part(job, process)
                    kill = False
                while process.poll() is None and not self.over.wait(0.5):
                    pass
            self.jobs[f"{job}: exit code {process.returncode}"] += 1
            if process.returncode == 0 or self.over.is_set():
                return
            said = log.read_text(errors="replace")
            if process.returncode not in (3, -9) and "the store does not answer" not in said:
                self.wrong.append(f"{job} ended with {process.returncode}: {said[-500:]}")
                return
        self.wrong.append(f"{job}: ten times the same command were not enough")

    def _kill_part(self, job: str, process: subprocess.Popen[bytes]) -> None:
        """After some seconds of the job, its driver or one of its workers."""
        who = self.random.choice(
            ["driver", *{"build_corpus": ["(Make)", "(Embed)"], "train": ["RayTrainWorker"]}[job] * 2]
        )
        pause = self.random.uniform(0, 12) if who == "driver" else self.random.uniform(0, 5)
        while process.poll() is None and not self.over.wait(0.2):
            parts = [psutil.Process(process.pid)] if who == "driver" else self._titled(who)
            if parts and not self.over.wait(pause):
                with suppress(psutil.Error):
                    self.random.choice(parts).kill()
                    self.kills[f"{job}: {'driver' if who == 'driver' else 'worker'}"] += 1
                return

    def _compare(self, job: str, uri: str) -> None:
        found: Any = outcome(uri) if job == "build_corpus" else None
        store = open_store(uri)
        if job == "train":
            found = {
                name: store.read(name) for name, _, _ in store.objects("synthesizer") if name.endswith("safetensors")
            }
        if self._expected.setdefault(job, found) != found:
            self.wrong.append(f"{uri} differs from the first {job}")
        for name in [name for name, _, _ in store.objects()]:
            store.delete(name)

    def kill(self) -> None:
        """Now and then the younger replica of a stage, or the S3 server."""
        while not self.over.wait(self.random.uniform(*KILL_EVERY)):
            who = self.random.choice([*STAGES, "S3 server"])
            if who == "S3 server":
                self.weed.kill()
                time.sleep(self.random.uniform(0, 2))
                self.weed.start()
                self.others["S3 server"] = psutil.Process(self.weed.process.pid)
                self.kills[who] += 1
                continue
            replicas = sorted(self._titled(f"lora-diffusion:{who}"), key=lambda process: process.create_time())
            if len(replicas) > 1:
                with suppress(psutil.Error):
                    replicas[-1].kill()
                    self.kills[f"replica of {who}"] += 1

    def steady(self) -> None:
        """Start steady.py, and read what it says."""
        command = [
            sys.executable,
            str(Path(__file__).with_name("steady.py")),
            str(self.folder / "steady"),
            f"s3://{BUCKET}/steady",
        ]
        (self.folder / "steady").mkdir()
        with (self.folder / "steady.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=heard)
        self.others["corpora and trainings in one process"] = psutil.Process(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"round"'):
                said = json.loads(line)
                self.jobs["rounds in one process"] += 1
                self.jobs["commands again in one process"] += said["again"]
                if not said["equal"]:
                    self.wrong.append(f"steady.py: {line}")
        if not self.stopped.is_set():
            self.wrong.append(f"steady.py ended: {(self.folder / 'steady.log').read_text()[-1000:]}")

    # --- who is looked at

    def family(self) -> Iterator[tuple[str, psutil.Process]]:
        yield from self.others.items()
        for process in self._below():
            with suppress(psutil.Error):
                yield measure.name_of(process), process

    def _below(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            return self.ray.children(recursive=True)
        return []

    def _titled(self, word: str) -> list[psutil.Process]:
        found = []
        for process in self._below():
            with suppress(psutil.Error):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def run(self, seconds: float) -> dict[str, Any]:
        with ExitStack() as stack:
            proxy = stack.enter_context(faulty(self.weed.server.endpoint, self.random.randrange(2**32), **FAULTS))
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            ray, self.ray = stack.enter_context(cluster(self.folder))
            words = [
                "graph=stages",
                "sampling.num_inference_steps=3",
                "limits.max_images=4",
                "deployments.Gateway.num_replicas=1",
            ]
            for stage in STAGES:
                words += [f"deployments.{stage}.autoscaling_config.{key}_replicas=2" for key in ("min", "max")]
            address, self.others["serve run"] = stack.enter_context(endpoint(self.folder, ray, words))
            client = Client(address, self.random.randrange(2**32), patience=90, allowed={"deadline_exceeded"})  # 60 s
            self.others |= {"S3 server": psutil.Process(self.weed.process.pid), "this script": psutil.Process()}
            recorder = measure.Recorder(
                self.family, {"files of Ray's logs": self.folder / "ray", "files in TMPDIR": self.folder / "tmp"}
            )
            threads = [
                threading.Thread(target=self._thread, args=work)
                for work in ((self.ask, client), (self.work, ray), (self.kill,), (self.steady,))
            ]
            for thread in threads:
                thread.start()
            while (left := recorder.begin + seconds - time.monotonic()) > 0 and not self.stopped.wait(
                min(left, EVERY, seconds / 20)
            ):
                recorder.look()
                print(
                    f"{time.monotonic() - recorder.begin:.0f} s: {client.answers.total()} answers, {dict(self.jobs)}, "
                    f"{dict(self.kills)}, wrong: {self.wrong + client.wrong}",
                    file=sys.stderr,
                    flush=True,
                )
            rows = recorder.slopes(min(900, seconds / 4))
            self.over.set()
            self.stopped.set()
            with suppress(psutil.Error, KeyError):
                self.others["corpora and trainings in one process"].kill()
            for thread in threads:
                thread.join(120)
        return {
            "seconds": seconds,
            "slopes": rows,
            "answers": dict(sorted(client.answers.items())),
            "longest_answer": round(client.longest, 1),
            "jobs": dict(self.jobs),
            "kills": dict(self.kills),
            "faults": proxy.counts,
            "wrong": self.wrong + client.wrong,
        }

    def _thread(self, work: Any, *args: Any) -> None:
        try:
            work(*args)
        except Exception:
            if not self.over.is_set():
                self.wrong.append(traceback.format_exc())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of all that is printed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and nothing is left behind
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    for name in ("tmp", "weed"):
        (folder / name).mkdir()
    os.environ |= {
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    os.environ |= {"RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    tempfile.tempdir = None
    with running(new_server(), folder / "weed") as weed:
        result = Soak(folder, args.seed, weed).run(args.seconds)
    steep = measure.too_steep(result["slopes"]) if args.seconds >= SHORT else []
    print(measure.table(result["slopes"]))
    print(json.dumps({key: value for key, value in result.items() if key != "slopes"}, indent=1))
    print(
        *(steep or ["nothing grows" if args.seconds >= SHORT else "too short to say what grows"]), sep="\n", flush=True
    )
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, **result, "too_steep": steep}))
    if not result["wrong"]:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(result["wrong"] or steep))


if __name__ == "__main__":
    sys.exit(main())
