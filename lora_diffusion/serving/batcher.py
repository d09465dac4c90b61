"""Single requests in, batches out: whatever waits when the worker becomes free is its next batch.

Why not `@serve.batch`: it closes a batch after a fixed wait even while the previous one still runs, so it either adds
that wait to every lone request, or (wait 0) lines up batches of one under load. Here a lone request starts at once, and
under load batches fill by themselves. Requests that were cancelled or whose deadline has passed are dropped before they
cost anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

from lora_diffusion.serving.errors import ServingError, deadline_exceeded

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Timing:
    """Where a request's time went in one stage. Seconds; `batch_size` is that of the batch it ran in."""

    stage: str
    wait_seconds: float
    work_seconds: float
    batch_size: int


@dataclass
class _Entry(Generic[Item, Value]):
    item: Item
    deadline: float
    future: asyncio.Future[tuple[Value, Timing]]
    arrived: float


class Batcher(Generic[Item, Value]):
    """Runs `work(items)` in a thread of its own, one batch at a time.

    work: answers in the order of the items; an Exception in the list is raised to that item's caller. What it raises for a
        batch is found out by running each item alone, so that it reaches those alone whose data makes it raise.
    max_batch_size, max_waiting: bounds of a batch, and of the queue (beyond it: ServingError "overloaded").
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Value | Exception]],
        *,
        max_batch_size: int = 16,
        max_waiting: int = 256,
    ) -> None:
        self.name = name
        self._work = work
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[_Entry[Item, Value]] = deque()
        self._arrival = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item, deadline: float) -> tuple[Value, Timing]:
        """The answer and where the time went. `deadline`: as messages.py has it. Raises ServingError, or what `work` says."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:  # `asyncio.run` once more
            self._waiting, self._arrival = deque(), asyncio.Event()
            self._task = loop.create_task(self._run(), context=Context())  # not the first request's
        if len(self._waiting) >= self._max_waiting:
            raise ServingError("overloaded", f"{self._max_waiting} requests wait for {self.name} already.")
        entry: _Entry[Item, Value] = _Entry(item, deadline, loop.create_future(), time.perf_counter())
        self._waiting.append(entry)
        self._arrival.set()
        return await entry.future  # cancelled with its caller, and then skipped

    async def _run(self) -> None:
        while True:
            await self._arrival.wait()
            batch = self._take()
            if not self._waiting:
                self._arrival.clear()
            if batch:
                await self._work_on(batch)

    def _take(self) -> list[_Entry[Item, Value]]:
        batch: list[_Entry[Item, Value]] = []
        now = time.monotonic()
        while self._waiting and len(batch) < self._max_batch_size:
            entry = self._waiting.popleft()
            if entry.future.done():
                continue
            if entry.deadline <= now:
                entry.future.set_exception(deadline_exceeded(f"while it waited for {self.name}"))
                continue
            batch.append(entry)
        return batch

    async def _work_on(self, batch: list[_Entry[Item, Value]]) -> None:
        started = time.perf_counter()
        answers = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._isolated, [entry.item for entry in batch]
        )
        ended = time.perf_counter()
        for entry, answer in zip(batch, answers, strict=True):
            if entry.future.done():
                continue
            if isinstance(answer, Exception):
                entry.future.set_exception(answer)
            else:
                timing = Timing(self.name, started - entry.arrived, ended - started, len(batch))
                entry.future.set_result((answer, timing))

    def _isolated(self, items: Sequence[Item]) -> Sequence[Value | Exception]:
        try:
            answers = self._work(items)
            if len(answers) != len(items):
                raise RuntimeError(f"{self.name} gave {len(answers)} answers to {len(items)} items")
            return answers
        except Exception as error:
            return [error] if len(items) == 1 else [self._isolated([item])[0] for item in items]
