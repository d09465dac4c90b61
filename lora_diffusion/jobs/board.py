"""What workers say, on its way to the driver's terminal. Light: an actor imports its module, and this one needs only Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Board:
    """Lines, kept until the driver shows them, and the first error. An actor."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error = ""

    def say(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def fail(self, message: str) -> None:
        self.error = self.error or message

    def problem(self) -> str:
        return self.error


def new_board() -> Any:
    """On the driver's machine: another one may be taken away."""
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=with_the_driver()).remote()


def with_the_driver() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def show_while(work: Callable[[], object], board: Any) -> None:
    """`work()`, with what the workers say. Not on the main thread: there Ray takes Ctrl-C for itself.

    Raises what `work` raises, and ValueError with the first error that a worker reported.
    """
    from lora_diffusion.training.progress import Lines

    raised: list[BaseException] = []
    show = Lines()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        thread.join(1.0)
        over = not thread.is_alive()
        for line in ray.get(board.take.remote()):
            show(line)
        if over:
            break
    if raised:
        raise raised[0]
    if problem := ray.get(board.problem.remote()):
        raise ValueError(problem)
