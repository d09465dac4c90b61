"""Kills processes at random until time is up, gives the same command again, and compares with a run that nobody disturbed.

    python tests/chaos/chaos.py --seconds 600 --seed 0

A round is one corpus or training: its processes are killed up to eight times, then it is left in peace; its files must equal the calm
run's, byte for byte, and everybody who was planned must be in it once. Prints a table, and every kill with --log FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import psutil  # noqa: E402
from s3_faults import faulty  # noqa: E402
from s3_server import BUCKET, Weed, new_server, running  # noqa: E402
from tally import Tally, contents, table  # noqa: E402

PROCESSES = multiprocessing.get_context("forkserver")
PATIENCE = 600  # seconds for a round in peace: a process that hangs is a fault
FAULTS = {"throttled": 0.02, "failed": 0.01, "refused": 0.02, "hung": 0.005, "cut": 0.02}


class Chaos:
    """Rounds by kind, all from one seed. `server`: an S3 server that may be killed, for the kinds that want one."""

    def __init__(self, folder: Path, seed: int, server: Weed | None = None) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the only path by which it finds what it loads beforehand
        PROCESSES.set_forkserver_preload(["victims"])
        import victims

        self.victims, self.folder, self.server = victims, folder, server
        self.random = random.Random(seed)
        self.tallies: dict[str, Tally] = {}
        self._number = 0
        for name in ("first", "calm"):  # the first waits for the imports
            begin = time.monotonic()
            self.run_in_peace(victims.corpus, str(folder / name))
            self.seconds = time.monotonic() - begin
        self.calm = contents(str(folder / "calm"))

    def start(self, function: Callable[..., None], *args: Any) -> Any:
        """A process with the function, whose words go to `log`."""
        process = PROCESSES.Process(target=_logged, args=(str(self.folder / "log"), function, *args), daemon=False)
        process.start()
        return process

    def run_in_peace(self, function: Callable[..., None], *args: Any) -> None:
        process = self.start(function, *args)
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            raise AssertionError(f"exit code {process.exitcode}: {(self.folder / 'log').read_text()[-3000:]}")

    def __str__(self) -> str:
        return f"kills: {', '.join(f'{tally.kills} of {name}' for name, tally in self.tallies.items())}"

    # --- rounds: each returns when its corpus or training is whole again

    def local(self) -> None:
        """Driver and two workers, on a disk."""
        uri = str(self.new("local"))
        self._harass("local", uri, uri, 2)

    def s3(self) -> None:
        """One process, on an S3 server that throttles, fails, hangs and cuts, and is itself killed."""
        assert self.server is not None
        with faulty(self.server.server.endpoint, self.random.randrange(2**32), **FAULTS) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            try:
                uri = f"s3://{BUCKET}/{self.new('s3').name}"
                self._harass("s3", uri, uri)
            finally:
                os.environ["AWS_ENDPOINT_URL"] = self.server.server.endpoint

    def between(self, point: str = "") -> None:
        """A driver that dies exactly at one of its writes."""
        uri, tally = str(self.new("between two writes")), self.tallies["between two writes"]
        point = point or f"{self.random.randint(1, 20)} {self.random.choice(['before', 'half', 'after'])}"
        begin = time.monotonic()
        process = self.start(self.victims.corpus, uri, point)
        process.join(PATIENCE)
        if process.exitcode == -9:
            tally.kill("at its write " + point.split()[1], time.monotonic() - begin, len(contents(uri)))
        elif process.exitcode != 0:
            raise AssertionError((self.folder / "log").read_text()[-3000:])
        self.run_in_peace(self.victims.corpus, uri)
        self.compare("between two writes", uri, self.calm)

    def disk(self) -> None:
        """A disk that takes no file beyond some size: refused in a sentence."""
        uri, tally = str(self.new("full disk")), self.tallies["full disk"]
        limit = self.random.randint(500, 12_000)
        process = self.start(self.victims.corpus, uri, "", 0, limit)
        process.join(PATIENCE)
        said = (self.folder / "log").read_text()
        if process.exitcode == 1 and "the disk is full" in said.splitlines()[-1]:
            tally.kill("refused by the disk", 0, len(contents(uri)))
        elif process.exitcode != 0:
            raise AssertionError(f"exit code {process.exitcode}: {said[-3000:]}")
        self.run_in_peace(self.victims.corpus, uri)
        self.compare("full disk", uri, self.calm)

    def clock(self) -> None:
        """The clock jumps by a day, several times a second; of a driver, too, that is killed."""
        import clock

        if clock.CC:
            clock.round_of(self)

    def training(self) -> None:
        """A training, killed after its first checkpoint."""
        base = self.folder / "training"
        words = [str(base / "corpus"), str(base / "calm"), str(base / "cache")]
        if not base.exists():
            self.run_in_peace(self.victims.training_corpus, words[0])
            self.run_in_peace(self.victims.training, *words)
        uri, tally = self.new("training"), self.tallies["training"]
        words[1] = str(uri)
        for _ in range(self.random.randint(1, 3)):
            begin = time.monotonic()
            process = self.start(self.victims.training, *words)
            while process.is_alive() and not (uri / "checkpoints" / "vae.safetensors").exists():
                time.sleep(0.005)
            process.join(self.random.uniform(0, 5))
            if process.is_alive():
                saved = sorted(path.name for path in uri.glob("checkpoints/*"))
                process.kill()
                process.join()
                tally.kill("after a checkpoint", time.monotonic() - begin, len(contents(str(uri))))
                tally.log[-1]["checkpoints"] = saved
                assert "vae.safetensors" in saved  # what a training goes on from
        self.run_in_peace(self.victims.training, *words)
        self.compare("training", str(uri), contents(str(base / "calm")), ".safetensors")

    # --- what they share

    def new(self, kind: str) -> Path:
        self.tallies.setdefault(kind, Tally()).rounds += 1
        self._number += 1
        return self.folder / f"{kind.replace(' ', '-')}-{self._number}"

    def _harass(self, kind: str, uri: str, *words: Any) -> None:
        """Kill, give the command again, and so on; then in peace."""
        tally, function, words = self.tallies[kind], self.victims.corpus, (words[0], "", *words[1:])
        left, orphans = self.random.randint(2, 8), set()
        while left:
            begin = time.monotonic()
            process = self.start(function, *words)
            while left and process.is_alive():
                process.join(self.random.uniform(0, 1.2 * self.seconds))
                if not process.is_alive():
                    break
                children = _living(process.pid)
                who = self.random.choice(
                    ["driver", *["worker"] * 3 * bool(children), *["S3 server"] * uri.startswith("s3:")]
                )
                left -= 1
                if who == "worker":
                    with suppress(psutil.Error):
                        self.random.choice(children).kill()
                elif who == "driver":
                    orphans.update(children)
                    process.kill()
                    process.join()
                elif self.server:
                    self.server.kill()
                    time.sleep(self.random.uniform(0, 1.0))
                    self.server.start()
                tally.kill(who, time.monotonic() - begin, len(contents(uri)) if not uri.startswith("s3:") else -1)
            process.join(PATIENCE)
            if process.exitcode == 0:
                break
            if process.exitcode == 1 and "the store does not answer" in (self.folder / "log").read_text():
                self.tallies[kind].victims["refused in a sentence"] += 1
            elif process.exitcode != -9:
                raise AssertionError(f"exit code {process.exitcode}: {(self.folder / 'log').read_text()[-3000:]}")
        psutil.wait_procs(orphans, timeout=PATIENCE)  # workers of a killed driver may still write
        self.run_in_peace(function, *words)
        self.compare(kind, uri, self.calm)

    def compare(self, kind: str, uri: str, calm: dict[str, bytes], of: str = "") -> None:
        tally, found = self.tallies[kind], contents(uri)
        different = [name for name in {**found, **calm} if name.endswith(of) and found.get(name) != calm.get(name)]
        tally.different += bool(different)
        if not of:
            from lora_diffusion.corpus import CorpusReader

            reader = CorpusReader(uri)
            there = Counter(reader.identities + [f.identity for f in reader.failures() if f.photo is None])
            tally.lost += len(set(self.victims.ALL) - set(there))
            tally.doubled += sum(count - 1 for count in there.values())
        if different:
            tally.log.append({"round": tally.rounds, "different": sorted(different)})
        if not uri.startswith("s3:"):
            shutil.rmtree(uri)


def _logged(log: str, function: Callable[..., None], *args: Any) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from victims import told

    told(function, *args)


def _living(parent: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        below = psutil.Process(parent).children(recursive=True)
        return [child for child in below if child.status() != psutil.STATUS_ZOMBIE]
    return []


@contextmanager
def with_server(folder: Path) -> Iterator[Weed]:
    (folder / "weed").mkdir()
    with running(new_server(), folder / "weed") as weed:
        yield weed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=int, default=8, help="rounds of the corpus job on Ray, a minute or two each")
    parser.add_argument("--evaluation", type=int, default=3, help="rounds of the evaluation on Ray, two minutes each")
    parser.add_argument("--serving", type=int, default=2, help="rounds of the endpoint on Ray, five minutes each")
    parser.add_argument("--log", type=Path, help="a JSON file of every kill")
    args = parser.parse_args()
    from ray_rounds import corpus, evaluation  # here, as each process that is killed imports this file
    from serving import serving

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the table is printed all the same
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    with with_server(folder) as server:
        chaos, begin = Chaos(folder, args.seed, server), time.monotonic()
        try:
            often = [chaos.local, chaos.between, chaos.between]
            for kind in itertools.cycle([*often * 3, chaos.training, *often * 3, chaos.disk, chaos.s3, chaos.clock]):
                if time.monotonic() - begin > args.seconds:
                    break
                kind()
                print(f"{time.monotonic() - begin:.0f} s, {chaos}", file=sys.stderr, flush=True)
            for whole in [corpus] * args.ray + [evaluation] * args.evaluation + [serving] * args.serving:
                whole(chaos)
                print(f"{time.monotonic() - begin:.0f} s, {chaos}", file=sys.stderr, flush=True)
        finally:
            print(table(chaos.tallies, args.seed, time.monotonic() - begin), flush=True)
            if args.log:
                args.log.write_text(json.dumps({kind: tally.log for kind, tally in chaos.tallies.items()}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    return int(any(t.lost or t.doubled or t.different for t in chaos.tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
