"""What Prometheus reads at /metrics: requests, and for each stage how long it waited, how long it worked, in which batch.

A gateway counts what went through itself. With several, scrape each at its own port: the proxy's leads to any of them.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_diffusion.serving.batcher import Timing

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX = "lora_diffusion"


class Metrics:
    """One registry for one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(f"{PREFIX}_requests", "Answers", ["route", "status"], registry=registry)
        self._request_seconds = Histogram(
            f"{PREFIX}_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self._wait = Histogram(
            f"{PREFIX}_stage_wait_seconds", "Time in the stage's queue", ["stage"], buckets=SECONDS, registry=registry
        )
        self._work = Histogram(
            f"{PREFIX}_stage_work_seconds", "Time of the stage's work", ["stage"], buckets=SECONDS, registry=registry
        )
        self._batch = Histogram(
            f"{PREFIX}_stage_batch_size", "Requests in the batch", ["stage"], buckets=BATCHES, registry=registry
        )
        self.in_flight = Gauge(f"{PREFIX}_requests_in_flight", "Requests being worked on", registry=registry)
        self.wrong_keys = Counter(f"{PREFIX}_wrong_keys", "Requests with a wrong API key", registry=registry)
        self.problems = Counter(f"{PREFIX}_problems", "Refusals and failures", ["reason"], registry=registry)
        self.kept = Histogram(
            f"{PREFIX}_library_put_seconds", "Until a made LoRA is kept", buckets=SECONDS, registry=registry
        )
        self._loras = Gauge(f"{PREFIX}_library_loras", "LoRAs in memory", registry=registry)
        self._bytes = Gauge(f"{PREFIX}_library_bytes", "Bytes of the LoRAs in memory", registry=registry)

    def stage(self, timing: Timing) -> None:
        self._wait.labels(timing.stage).observe(timing.wait_seconds)
        self._work.labels(timing.stage).observe(timing.work_seconds)
        self._batch.labels(timing.stage).observe(timing.batch_size)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def library(self, stats: dict[str, Any]) -> None:
        """stats: empty where a store holds them."""
        self._loras.set(stats.get("loras", 0))
        self._bytes.set(stats.get("bytes", 0))

    def exposition(self) -> tuple[bytes, str]:
        """The text, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
