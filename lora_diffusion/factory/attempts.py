"""Who was begun and never ended: the ledger that outlives a worker."""

from __future__ import annotations

from typing import Protocol


class Attempts(Protocol):
    """Counts how often something was begun and never ended."""

    def begin(self, key: str) -> int:
        """How often `key` was begun before without an end; counts one more."""
        ...

    def end(self, key: str) -> None:
        """`key` ended, well or badly, and the process lives."""
        ...


class InMemoryAttempts:
    """Attempts in this process: exact, but gone with it. Enough without Ray."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}

    def begin(self, key: str) -> int:
        before = self.open.get(key, 0)
        self.open[key] = before + 1
        return before

    def end(self, key: str) -> None:
        self.open.pop(key, None)
