"""The long run: every reader of bytes from outside, as many hostile files as one likes.

    python -m tests.fuzz lora --cases 1000000
    python -m tests.fuzz --seconds 60            # every reader for a minute

What raises anything but ValueError, ends the process, takes more than 5 seconds of the processor or 2 GB is printed with its seed, written to
tests/hostile/, and counted; the exit code is 1 then. Cases of tests/hostile/ are tests from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent / "support")]

import pyarrow as pa  # noqa: E402
from hostile import READERS, Reader  # noqa: E402
from mutations import mutate  # noqa: E402

KEPT = Path(__file__).parent / "hostile"
SHARED = Path("/dev/shm")
SECONDS, WAITING, BYTES = 5, 60, 2 * 2**30  # of one case: of the processor, of the clock, of memory
HEADER = "| reader | cases | a second of the processor | longest case | memory | faults |\n|---|---|---|---|---|---|"


class TooSlow(BaseException):
    """Not to be caught by a reader."""


class Run:
    """One reader, in a process of its own: a decoder that crashes ends that, and the next begins behind the case."""

    def __init__(self, name: str, first: int, cases: int, seconds: float) -> None:
        self.name, self.first, self.cases, self.seconds = name, first, cases, seconds
        self.shared = mmap.mmap(
            -1, 64
        )  # seed, faults, microseconds of the longest case and of all, kB of memory, seconds of the clock

    def __call__(self) -> int:
        """Prints its row of the table; returns the number of faults."""
        self._set(0, self.first)
        while self._get(0) < self.first + self.cases and self._get(5) < self.seconds:
            pid = os.fork()
            if pid == 0:
                try:
                    self._work()
                except BaseException:  # of this program, not of a reader
                    traceback.print_exc()
                    os._exit(1)
            ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if ended == 0:
                break
            if ended > 0:
                raise SystemExit(1)
            seed = self._get(0)
            self._keep(seed, self._data(seed), f"the process ended by signal {-ended}")
            self._set(0, seed + 1)
        cases, seconds = self._get(0) - self.first, self._get(3) / 1e6
        print(
            f"| {self.name} | {cases:,} | {cases / seconds:,.0f} | {self._get(2) / 1000:.0f} ms | + {self._get(4) / 1000:.0f} MB "
            f"| {self._get(1)} |",
            flush=True,
        )
        return self._get(1)

    def _work(self) -> None:
        """Of the child: all cases that are left."""
        places: set[str] = set()
        pa.set_cpu_count(1)
        pa.set_io_thread_count(1)
        with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
            reader, seeds = prepared(self.name, Path(folder))
            limit()
            before, spent, begun = peak(), self._get(3), time.process_time()
            clock = time.monotonic() - self._get(5)
            for seed in range(self._get(0), self.first + self.cases):
                self._set(0, seed)
                data = hostile(reader, seeds, seed)
                started = time.process_time()
                error = attempt(reader, Path(folder), data)
                ended = time.process_time()
                if error and (place := where(error)) not in places:
                    places.add(place)
                    self._keep(seed, data, f"{place}: {error!r:.200}")
                self._set(2, max(self._get(2), round(1e6 * (ended - started))))
                self._set(3, spent + round(1e6 * (ended - begun)))
                self._set(4, max(self._get(4), peak() - before))
                self._set(5, int(time.monotonic() - clock))
                self._set(0, seed + 1)
                if self._get(5) >= self.seconds:
                    break
        os._exit(0)

    def _data(self, seed: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return hostile(*prepared(self.name, Path(folder)), seed)

    def _keep(self, seed: int, data: bytes, what: str) -> None:
        self._set(1, self._get(1) + 1)
        print(f"{self.name}, seed {seed}: {what}", flush=True)
        (KEPT / f"{self.name}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)

    def _get(self, place: int) -> int:
        return int.from_bytes(self.shared[8 * place : 8 * place + 8], "little")

    def _set(self, place: int, value: int) -> None:
        self.shared[8 * place : 8 * place + 8] = value.to_bytes(8, "little")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prepared(name: str, folder: Path) -> tuple[Reader, list[bytes]]:
    reader = READERS[name]
    reader.prepare(folder)
    seeds = reader.seeds(folder)
    with suppress(ValueError):
        reader.read(folder, seeds[0])  # what it imports takes seconds
    return reader, seeds


def hostile(reader: Reader, seeds: list[bytes], seed: int) -> bytes:
    random = Random(seed)
    return mutate(random, random.choice(seeds), reader.change)


def attempt(reader: Reader, folder: Path, data: bytes) -> BaseException | None:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        reader.read(folder, data)
    except ValueError:
        pass
    except (Exception, TooSlow) as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def where(error: BaseException) -> str:
    """The last line of ours that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "lora_diffusion" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else type(error).__name__


def limit() -> None:
    def stop(*_: object) -> None:
        raise TooSlow

    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"default: all of {', '.join(READERS)}")
    parser.add_argument("--cases", type=int, default=10**12, help="of each reader")
    parser.add_argument("--seconds", type=float, default=10**9, help="of each reader")
    parser.add_argument("--seed", type=int, default=0, help="of the first case, +1 for each further one")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(HEADER, flush=True)
    return 1 if sum(Run(name, args.seed, args.cases, args.seconds)() for name in args.readers or READERS) else 0


if __name__ == "__main__":
    sys.exit(main())
