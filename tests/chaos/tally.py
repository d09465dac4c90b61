"""What was done to each kind of victim, what came of it, and the table of all."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Tally:
    """What was done to one kind of victim, and what came of it."""

    rounds: int = 0
    kills: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    log: list[dict[str, Any]] = field(default_factory=list)

    def kill(self, who: str, seconds: float, files: int) -> None:
        self.kills += 1
        self.victims[who] += 1
        self.log.append({"round": self.rounds, "killed": who, "after_seconds": round(seconds, 3), "files_there": files})


def contents(uri: str) -> dict[str, bytes]:
    """Every file below, but for those half-written; of the corpus' random key only that it is there."""
    found = _files(uri)
    return {name: b"" if name == "identity.key" else data for name, data in found.items()}


def _files(uri: str) -> dict[str, bytes]:
    if uri.startswith("s3:"):
        from lora_diffusion.storage import open_store

        store = open_store(uri)
        return {name: store.read(name) for name, _, _ in store.objects()}
    root, found = Path(uri), {}
    for path in root.rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError):
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def table(tallies: dict[str, Tally], seed: int, seconds: float) -> str:
    lines = ["| what | rounds | kills | of whom | lost | doubled | other bytes |", "|---|---|---|---|---|---|---|"]
    total = Counter[str]()
    for kind, t in tallies.items():
        whom = ", ".join(f"{count} {who}" for who, count in sorted(t.victims.items()))
        lines.append(f"| {kind} | {t.rounds} | {t.kills} | {whom} | {t.lost} | {t.doubled} | {t.different} |")
        total.update(rounds=t.rounds, kills=t.kills, lost=t.lost, doubled=t.doubled, different=t.different)
    numbers = " | ".join(str(total[name]) for name in ("lost", "doubled", "different"))
    lines.append(f"| **all** | {total['rounds']} | {total['kills']} | seed {seed}, {seconds:.0f} s | {numbers} |")
    return "\n".join(lines)


def survived(tally: Tally) -> bool:
    return (tally.lost, tally.doubled, tally.different) == (0, 0, 0) and tally.kills > 0
