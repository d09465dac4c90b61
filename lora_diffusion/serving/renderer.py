"""The engine with an event loop around it: requests come and go while the batch runs on.

Axes: H/W pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field

from lora_diffusion.serving.batcher import Timing
from lora_diffusion.serving.engine import Picture, Pixels, RenderEngine, Row
from lora_diffusion.serving.errors import ServingError, deadline_exceeded
from lora_diffusion.serving.messages import Progress


@dataclass(frozen=True)
class Drawn:
    """Picture `index` of the request is ready: uint8 RGB (H, W, 3)."""

    index: int
    pixels_HWC: Pixels


@dataclass(eq=False)
class _Request:
    pictures: Sequence[Picture]
    deadline: float
    events: asyncio.Queue[Progress | Drawn | Exception] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    busiest: int = 0
    rows: list[Row] = field(default_factory=list)
    error: Exception | None = None
    gone: bool = False


class AsyncRenderer:
    """Draws the pictures of all requests in one running batch of at most `max_rows`.

    Requests are admitted in order of arrival, as soon as all their pictures fit. More than `max_waiting` waiting pictures
    are refused (ServingError "overloaded"). A request that is cancelled, or whose deadline passes, leaves the batch at
    the next step. Model work runs in one thread, the event loop stays free.
    """

    def __init__(self, engine: RenderEngine, *, max_rows: int = 16, max_waiting: int = 64) -> None:
        self._engine = engine
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._arrival = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="renderer")
        self._task: asyncio.Task[None] | None = None

    async def draw(
        self, pictures: Sequence[Picture], deadline: float
    ) -> AsyncGenerator[Progress | Drawn | Timing, None]:
        """Events of one request, a Drawn for each picture as it is ready, a Timing at the end. `deadline`: as messages.py has it.

        Raises ServingError ("overloaded", "deadline_exceeded"). Closing the iterator takes the pictures out of the batch.
        """
        self._start()
        waiting = sum(len(request.pictures) for request in self._waiting)
        if waiting + len(pictures) > self._max_waiting:
            raise ServingError("overloaded", f"{waiting} pictures wait to be drawn already.")
        request = _Request(pictures, deadline)
        self._waiting.append(request)
        self._arrival.set()
        try:
            left = len(pictures)
            while left:
                event = await request.events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, Drawn)
                yield event
            ended = time.perf_counter()
            yield Timing("renderer", request.started - request.arrived, ended - request.started, request.busiest)
        finally:
            request.gone = True

    def _start(self) -> None:
        """The task that draws, in this event loop: it may be another one than at the last request (`asyncio.run` once more)."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._waiting, self._running, self._arrival = deque(), [], asyncio.Event()
            self._engine.drop(list(self._engine.rows))
            self._task = loop.create_task(self._run(), context=Context())  # not the first request's

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting and not self._running:
                self._arrival.clear()
                await self._arrival.wait()
            self._dismiss()
            admitted = self._admissible()
            await loop.run_in_executor(self._pool, self._advance, admitted)
            self._report()

    def _dismiss(self) -> None:
        """Who was cancelled or is too late leaves, waiting or running."""
        now = time.monotonic()
        for request in (*self._waiting, *self._running):
            if not request.gone and request.deadline <= now:
                request.events.put_nowait(deadline_exceeded("before its pictures were drawn"))
                request.gone = True
        for request in self._running:
            if request.gone:
                self._engine.drop(request.rows)
        self._waiting = deque(request for request in self._waiting if not request.gone)
        self._running = [request for request in self._running if not request.gone]

    def _admissible(self) -> list[_Request]:
        admitted = []
        rows = len(self._engine.rows)
        while self._waiting and (rows == 0 or rows + len(self._waiting[0].pictures) <= self._max_rows):
            request = self._waiting.popleft()
            rows += len(request.pictures)
            request.started = time.perf_counter()
            admitted.append(request)
        self._running += admitted
        return admitted

    def _advance(self, admitted: Sequence[_Request]) -> None:
        """A step for all. What the data of one request makes raise ends that request alone."""
        for request in admitted:
            try:
                request.rows = self._engine.admit(list(request.pictures))
            except Exception as error:
                request.error = error
        for request in self._running:
            request.busiest = max(request.busiest, len(self._engine.rows))
        try:
            self._engine.advance()
        except Exception:
            for request in self._running:
                try:
                    self._engine.advance(request.rows)
                except Exception as error:
                    self._engine.drop(request.rows)
                    request.error = error

    def _report(self) -> None:
        """Tell everybody in the batch how far they are. Those that are done leave; those that gave up do in `_dismiss`."""
        running = []
        for request in self._running:
            if request.error is not None:
                request.events.put_nowait(request.error)
                continue
            for index, row in enumerate(request.rows):
                if row.pixels_HWC is not None:
                    request.events.put_nowait(Drawn(index, row.pixels_HWC))
                    row.pixels_HWC = None
            if not all(row.finished for row in request.rows):
                running.append(request)
                total = sum(len(row.schedule) for row in request.rows)
                request.events.put_nowait(Progress(sum(row.step for row in request.rows), total))
        self._running = running

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._pool.shutdown()
