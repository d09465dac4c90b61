"""One process that makes a corpus and trains on one, over and over, by the library's own code: what leaks in it adds up.

    python tests/chaos/steady.py FOLDER s3://bucket/prefix

Prints a line of JSON for each round: {"round": 3, "equal": true, "again": 1}; again: how often the same command was needed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import victims  # noqa: E402
import whole_job  # noqa: E402
from factory_world import build_corpus, make_config, make_world  # noqa: E402

from lora_diffusion.storage import StoreError, open_store  # noqa: E402

REST = 4.0  # seconds of sleep for a second of work


def repeated(function: Any, *args: Any) -> int:
    """The same command until it is done; how often it was needed more than once."""
    for attempt in range(20):
        try:
            function(*args)
            return attempt
        except StoreError:
            time.sleep(1)
    raise AssertionError("20 tries were not enough")


def trained(uri: str) -> dict[str, bytes]:
    store = open_store(uri)
    return {name: store.read(name) for name, _, _ in store.objects("synthesizer") if name.endswith(".safetensors")}


def main(folder: Path, prefix: str) -> None:
    world, corpus = make_world(folder / "world"), f"{prefix}/vectors"
    repeated(victims.training_corpus, corpus)
    expected: Any = None
    for number in range(10**9):
        begin = time.process_time()
        uri = f"{prefix}/{number}"
        again = repeated(build_corpus, make_config(world, people=str(world / "people"), output=f"{uri}/corpus"))
        again += repeated(victims.training, corpus, f"{uri}/run", str(folder / "cache"))
        found = (whole_job.outcome(f"{uri}/corpus"), trained(f"{uri}/run"))
        expected = expected or found
        print(json.dumps({"round": number, "equal": found == expected, "again": again}), flush=True)
        store = open_store(uri)
        for name in [name for name, _, _ in store.objects()]:
            repeated(store.delete, name)
        time.sleep(REST * (time.process_time() - begin))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
