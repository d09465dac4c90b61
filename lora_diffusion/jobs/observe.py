"""What an operator sees of a job that runs: metrics at Ray's own exporter for Prometheus, and JSON lines in the workers' logs.

Nobody's name is in either: a person is the hash of the name with the corpus' key, as in `plan/` (formats.md).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from lora_diffusion.corpus.tombstone import keyed_hash

PREFIX = "lora_diffusion"  # Ray puts `ray_` before it
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
TRAINING = {  # names in a report of the training -> what they are
    "step": "Steps done",
    "loss": "Loss since the last report",
    "validation_loss": "Loss of the averaged weights on people who are not trained on",
    "rows_per_second": "Rows that all workers go through",
    "waiting_for_data": "Share of the time in which a step waits for its batch",
    "seconds_left": "Seconds to the end of the stage",
}


def log(**values: Any) -> None:
    """One JSON object as a line of this worker's log: a `.err` file in Ray's folder `logs`."""
    print(json.dumps({"time": round(time.time(), 3), **values}, ensure_ascii=False), file=sys.stderr, flush=True)


class CorpusObserver:
    """Of one worker of the corpus job. `run`: the corpus' address."""

    def __init__(self, run: str, key: bytes | None = None) -> None:
        self.tags, self.key = {"run": run}, key or b""
        self.people = Counter(f"{PREFIX}_corpus_people", "People answered, by outcome", ("run", "outcome"))
        self.failures = Counter(f"{PREFIX}_corpus_failures", "People without a LoRA, by reason", ("run", "reason"))
        self.seconds = Histogram(
            f"{PREFIX}_corpus_shard_seconds", "Time of a shard in a stage", SECONDS, ("run", "stage")
        )

    def stage(self, name: str, seconds: float) -> None:
        self.seconds.observe(seconds, {**self.tags, "stage": name})

    def shard(self, name: str, people: int, failed: Mapping[str, str], seconds: float) -> None:
        """A shard is committed. `failed`: identity -> reason."""
        self.stage("make", seconds)
        for outcome, count in (("done", people), ("failed", len(failed))):
            if count:
                self.people.inc(count, {**self.tags, "outcome": outcome})
        for identity, reason in failed.items():
            self.failures.inc(1, {**self.tags, "reason": reason})
            who = keyed_hash(self.key, identity).hex()
            log(event="failure", **self.tags, shard=name, identity=who, reason=reason)
        log(event="shard", **self.tags, shard=name, people=people, failed=len(failed), seconds=round(seconds, 3))


class TrainingObserver:
    """Of worker 0 of a training. `run`: the run's address."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.gauges = {
            name: Gauge(f"{PREFIX}_training_{name}", what, ("run", "stage")) for name, what in TRAINING.items()
        }

    def report(self, values: Mapping[str, Any]) -> None:
        for name, gauge in self.gauges.items():
            if name in values:
                gauge.set(float(values[name]), {**self.tags, "stage": values["stage"]})
        log(event="training", **self.tags, **{name: values[name] for name in ("stage", *TRAINING) if name in values})
