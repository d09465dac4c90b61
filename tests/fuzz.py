"""The long run: every reader of bytes from outside, as many hostile files as one likes.

    python -m tests.fuzz lora --cases 1000000
    python -m tests.fuzz --seconds 60            # every reader for a minute

What raises anything but ValueError, takes more than 5 seconds of the processor or 2 GB is printed with its seed, written to tests/hostile/, and
counted; the exit code is 1 then. Cases of tests/hostile/ are tests from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent / "support")]

from hostile import READERS, Reader, mutate  # noqa: E402

KEPT = Path(__file__).parent / "hostile"
SECONDS, WAITING, BYTES = 5, 60, 2 * 2**30  # of one case: of the processor, of the clock, of memory


class TooSlow(BaseException):
    """Not to be caught by a reader."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"default: all of {', '.join(READERS)}")
    parser.add_argument("--cases", type=int, default=10**12, help="of each reader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each reader")
    parser.add_argument("--seed", type=int, default=0, help="of the first case, +1 for each further one")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    limit()
    broken = 0
    for name in args.readers or READERS:
        begun, cases, faults = time.monotonic(), 0, set()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed, data, error in run(READERS[name], args.seed):
            cases += 1
            if error and (place := where(error)) not in faults:
                faults.add(place)
                print(f"{name}, seed {seed}: {place}: {error!r:.200}", flush=True)
                KEPT.mkdir(exist_ok=True)
                (KEPT / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
            if cases >= args.cases or time.monotonic() - begun > args.seconds:
                break
        seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(
            f"{name}: {cases:,} cases in {seconds:.0f} s, peak + {peak / 1e3:.0f} MB, {len(faults)} faults", flush=True
        )
        broken += len(faults)
    return 1 if broken else 0


def run(reader: Reader, seed: int) -> Iterator[tuple[int, bytes, BaseException | None]]:
    """(seed, bytes, what was raised that should not be) of one case after the other."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        reader.prepare(Path(folder))
        seeds = reader.seeds(Path(folder))
        with suppress(ValueError):
            reader.read(Path(folder), seeds[0])  # what it imports takes seconds
        while True:
            random = Random(seed)
            data = mutate(random, random.choice(seeds), reader.change)
            yield seed, data, attempt(reader, Path(folder), data)
            seed += 1


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


if __name__ == "__main__":
    sys.exit(main())
