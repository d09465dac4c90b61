"""What is killed: processes that make a tiny corpus or train a tiny synthesiser by the library's own protocol, without Ray.

Each is a function that `forkserver` can start: importing what it needs costs seconds, and is done once for hundreds of kills.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

import small_corpus
from low_rank_corpus import write_corpus
from small_corpus import MANIFEST, make

from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader, ShardPlan, ShardWriter, finish_corpus
from lora_diffusion.factory import planning
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.jobs.claim import claimed
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.training.begin import begin
from lora_diffusion.synthesis.training.dataset import RowCache, fill_cache
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.train_config import TrainConfig

FIRST = small_corpus.NAMES
ALL = [*FIRST, *(f"new {i}" for i in range(8))]  # a second part of the plan
WORK = 0.1  # seconds for a shard
LOOP = {"batch_size": 8, "warmup": 2, "log_every": 20, "validate_every": 20, "checkpoint_every": 20}
TRAINING: dict[str, Any] = {
    "vae": {"latent_size": 4, "hidden": [8], "dropout": 0.0},
    "pca": {"num_components": 4},
    "denoiser": {"width": 8, "depth": 1, "condition_width": 8, "generator_width": 4, "rank": 2},
    "vae_training": {**LOOP, "steps": 20},
    "denoiser_training": {**LOOP, "steps": 60},
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Die at the n-th write of this process: `3 before`, `3 half` (all is there, under a temporary name), `3 after`."""
    number, when = point.split()
    count, write, replace = itertools.count(1), Store.write, os.replace

    def dying_write(self: Store, name: str, data: bytes) -> None:
        here = next(count) == int(number)
        if here and when == "before":
            die()
        os.replace = die if here and when == "half" else replace
        write(self, name, data)
        if here and when == "after":
            die()

    Store.write = dying_write  # type: ignore[method-assign]


def told(function: Any, *args: Any) -> None:
    """The function; where it refuses, exit code 1 and the sentence, as a job has it. A traceback is a fault: code 70."""
    try:
        function(*args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def corpus(uri: str, point: str = "", workers: int = 0, disk: int = 0) -> None:
    """The whole corpus: begin, make what is missing, finish; then once more with new people. `disk`: bytes that a file may have."""
    if point:
        arm(point)
    if disk:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    with claimed(uri, "corpus"):
        for names in (FIRST, ALL):
            config = CorpusConfig(people="nowhere", output=uri)
            begun = planning.begin(config, MANIFEST, planning.Listed({name: PersonRef(name) for name in names}))
            if workers:
                _in_workers(begun.store, begun.todo, workers)
            else:
                for shard in begun.todo:
                    commit(begun.store, shard)
            infos, problems = CorpusReader(begun.store).verify(begun.plan.shards)
            if problems or len(infos) < len(begun.plan.shards):
                raise AssertionError(f"{len(infos)} shards, and {problems}")
            finish_corpus(begun.store, MANIFEST, infos)


def commit(store: Store, shard: ShardPlan) -> None:
    time.sleep(WORK)
    ShardWriter(store, MANIFEST).commit(shard, *make(shard))


def _in_workers(store: Store, todo: list[ShardPlan], workers: int) -> None:
    """A process for each shard, `workers` at a time; one that dies is begun anew, as Ray does it."""
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < workers:
            shard = waiting.pop(0)
            if not (pid := os.fork()):
                told(commit, open_store(store.uri), shard)
            running[pid] = shard
        pid, status = os.wait()
        shard = running.pop(pid)
        if os.WIFSIGNALED(status):
            waiting.append(shard)
        elif status:
            raise OSError(f"a worker ended with {status >> 8}")


def training_corpus(uri: str) -> None:
    write_corpus(open_store(uri), 40)


def training(corpus: str, output: str, cache: str) -> None:
    """All stages in this process."""
    config = from_dict(TrainConfig, {**TRAINING, "corpus": corpus, "output": output, "data": {"cache": cache}})
    with claimed(output, "train"):
        snapshot = begin(config)
        assert snapshot is not None
        rows = RowCache(snapshot, config.data.cache)
        fill_cache(rows)
        store = open_store(output)
        SynthesizerTraining(config, snapshot, rows.open(config.data), store, say=lambda line: None).run()


if __name__ == "__main__":
    told(corpus, sys.argv[1], "", 2)
