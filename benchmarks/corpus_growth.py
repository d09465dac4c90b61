"""What a corpus costs as it grows: 100, 1,000 and 10,000 people through the real job, then the same command again.

    python benchmarks/corpus_growth.py                       # writes benchmarks/results/corpus_growth.json
    python benchmarks/corpus_growth.py --sizes 100 1000 --photos 2

Fine-tuning takes 0 steps and nothing is rendered, so what is left is what grows with people: listing, planning, reading,
embedding, writing, statistics, and the resume of a finished corpus. A few rendered people lend their photos to everybody
(hard links), each under a name of its own. The memory of a fine-tuning worker is watched all the while.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.corpus.plan import shard_name
from lora_diffusion.factory.people import open_people
from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

ROOT = Path(__file__).resolve().parents[1]

LENDERS = range(20_000, 20_008)
WORKER = "MapBatches(Make)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--photos", type=int, default=1, help="photos of each person")
    parser.add_argument("overrides", nargs="*", help="key=value for the job, for example people_per_group=64")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        lend_photos(Path(folder) / "lenders", args.photos)
        for size in args.sizes:
            rows.append(measure(Path(folder), size, args.photos, args.overrides))
            print(rows[-1], flush=True)
    print("written:", write_result("corpus_growth", {"photos": args.photos, "overrides": args.overrides, "rows": rows}))


def measure(folder: Path, size: int, photos: int, overrides: list[str]) -> dict[str, Any]:
    people, output = folder / f"people{size}", folder / f"corpus{size}"
    give_photos(folder / "lenders", people, size)
    command = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "build_corpus.py")]
    command += [f"people={people}", f"output={output}", "finetune.steps=0", "score.prompts=[]", "photos.min_photos=1"]
    command += overrides
    row: dict[str, Any] = {"people": size}
    with WatchedMemory(WORKER) as memory:
        row["build_seconds"] = timed(lambda: run(command))
    row["worker_memory_mb"] = memory.report()
    row["resume_seconds"] = timed(lambda: run(command))
    row["list_seconds"] = timed(lambda: open_people(str(people)).list_people())
    reader = CorpusReader(output)
    row["plan_seconds"] = timed(lambda: reader.plan.shards)
    row["verify_seconds"] = timed(lambda: reader.verify())
    names = [f"statistics/{shard_name(index)}.safetensors" for index in reader.shards]
    parts = reader.store.read_many(names)
    row["statistics_seconds"] = timed(lambda: Statistics.merged(map(Statistics.from_bytes, parts), reader.layout.size))
    row["megabytes"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    assert len(reader) == size, f"{len(reader)} of {size} people are in the corpus"
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def lend_photos(folder: Path, photos: int) -> None:
    lenders = FacesFolder(str(folder), FacesConfig(views=photos))
    FacesWriter(str(folder), FacesConfig(views=photos))({"numbers": lenders.missing(LENDERS)})


def give_photos(lenders: Path, people: Path, size: int) -> None:
    sources = [sorted(folder.glob("*.jpg")) for folder in sorted(lenders.glob("person-*"))]
    for number in range(size):
        folder = people / f"person-{number:06d}"
        folder.mkdir(parents=True)
        for photo in sources[number % len(sources)]:
            os.link(photo, folder / photo.name)


def run(command: list[str]) -> None:
    env = {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **os.environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class WatchedMemory:
    """Unique memory (USS) of the processes below this one whose title holds `word`, once a second."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.samples: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> WatchedMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            found = []
            for process in psutil.Process().children(recursive=True):
                try:
                    if self.word in " ".join(process.cmdline()):
                        found.append(process.memory_full_info().uss / 1e6)
                except psutil.Error:
                    continue
            if found:
                self.samples.append(max(found))

    def report(self) -> dict[str, float]:
        """After a quarter of the time, and at the end: the means of ten samples; and the largest."""
        if len(self.samples) < 4:
            return {}
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : quarter + 10], self.samples[-11:-1]
        means = {"after_a_quarter": sum(early) / len(early), "at_the_end": sum(late) / max(1, len(late))}
        return {key: round(value, 1) for key, value in {**means, "peak": max(self.samples)}.items()}


if __name__ == "__main__":
    main()
