"""The Ray that a job works on: connects, sets Ray Data up, and says so when it waits for what is not there."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from lora_diffusion.jobs.watch import PATIENCE

PLURAL = {"CPU": "CPUs", "GPU": "GPUs"}


@dataclass(frozen=True)
class Need:
    """`count` processes of one kind that must run at the same time. keys: the settings that say so."""

    what: str
    keys: str
    cpus: float
    gpus: float = 0
    count: int = 1

    @property
    def resources(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    def __str__(self) -> str:
        each = _amounts(self.resources)
        return f"{self.what} wants {each}{f' for each of {self.count} workers' if self.count > 1 else ''} ({self.keys})"


def connect(address: str, needs: Sequence[Need] = ()) -> None:
    """`address` is "local" (a Ray of the job's own, which ends with it), "auto" or HOST:PORT. Stays with one that is connected.

    A Ray of our own has as many logical CPUs as `needs` ask for, whatever the machine has. It has no dashboard, whose dozen
    processes would take the first seconds of every core; who wants it starts Ray (`ray start --head`) and gives
    `--ray-address auto`. Raises ValueError if there is no Ray at `address`, or if it can never hold `needs`.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    wanted = sum(need.cpus * need.count for need in needs)
    own: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)), "include_dashboard": False}
    if not ray.is_initialized():
        print("Ray: starts on this machine" if address == "local" else f"Ray: at {address}", flush=True)
        try:
            _init(address, own if address == "local" else {})
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise ValueError(
                f"no Ray answers at {address} ({_first_line(error)}). Start one with `ray start --head`, with the same "
                "RAY_AUTH_MODE as here, or give --ray-address local for one on this machine"
            ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # waiting for a spot GPU is no error
    context.target_max_block_size = None  # a block is a unit of our own: never cut in two
    context.raise_original_map_exception = True  # so that `find_cause` finds it
    make_room(needs, 0 if address == "local" else PATIENCE)


def _init(address: str, options: Mapping[str, Any]) -> None:
    """`ray.init`, up to three times: a Ray of our own has 30 s to start, which a busy machine may need for other things."""
    for attempt in range(3):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or attempt == 2:
                raise
            print("Ray did not start within 30 s: this machine is busy. Once more.", flush=True)
            ray.shutdown()


def rows_of(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Rows of the results as they come, in whatever order."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast(pa.Table, batch).to_pylist()


def make_room(needs: Sequence[Need], patience: float) -> None:
    """Return when Ray has machines for all `needs`, or an autoscaler that may bring them.

    After `patience` seconds a line says what is wanted and what there is. Raises ValueError if it can never be.
    """
    deadline = time.monotonic() + patience
    while missing := find_missing(needs, _machines()):
        if time.monotonic() < deadline:
            time.sleep(0.5)
            continue
        there = f"{missing}; this Ray has {_all(_machines())}"
        if not _may_grow():
            raise ValueError(
                f"{there}, and no autoscaler that could bring more. Ask for less with {missing.keys}, or add machines to this Ray"
            )
        print(f"{there}: waiting for its autoscaler", flush=True)
        return
    free = ray.available_resources()
    for name in ("CPU", "GPU"):
        wanted = sum(need.resources.get(name, 0) * need.count for need in needs)
        if wanted > free.get(name, 0) + 1e-6:
            there = ray.cluster_resources().get(name, 0)
            print(
                f"{wanted:g} {PLURAL[name]} are wanted, {free.get(name, 0):g} of {there:g} are free: waiting",
                flush=True,
            )


def _machines() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def find_missing(needs: Sequence[Need], machines: Sequence[Mapping[str, float]]) -> Need | None:
    """The first of `needs` that finds no room on `machines` (their CPUs and GPUs), each process where it fits first."""
    left = [dict(machine) for machine in machines]
    for need in sorted(needs, key=lambda need: (-need.gpus, -need.cpus)):
        wanted = need.resources.items()
        for _ in range(need.count if wanted else 0):
            where = next((m for m in left if all(m.get(name, 0) + 1e-6 >= amount for name, amount in wanted)), None)
            if where is None:
                return need
            for name, amount in wanted:
                where[name] -= amount
    return None


def _may_grow() -> bool:
    """Whether an autoscaler works for this Ray. One that only looks on names a kind of machine after each machine."""
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
        report = status.get("autoscaler_report") or {}
        kinds = report.get("active_nodes") or {}
        return not all(kind.startswith("node_") for kind in kinds) or bool(
            ray._private.state.state.get_cluster_config()
        )
    except Exception:  # parts of Ray that may change: then rather wait, with a word, than refuse
        return True


def _amounts(resources: Mapping[str, float]) -> str:
    parts = [f"{amount:g} {PLURAL[name] if amount != 1 else name}" for name, amount in resources.items()]
    return " and ".join(parts) or "nothing"


def _all(machines: Sequence[Mapping[str, float]]) -> str:
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in PLURAL}
    return f"{_amounts(total)} on {len(machines)} machine{'s' * (len(machines) != 1)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
