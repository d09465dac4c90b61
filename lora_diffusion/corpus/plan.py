"""Who lies where: each identity has one position, one group and one shard, for ever.

The first run sorts the identities and writes the list down. A later run that finds new people appends them as a new
part, which starts a new shard; nobody who was planned before moves. So a retry makes the same group of the same people,
and with it the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property


class CorpusError(ValueError):
    """A corpus, or what is to be written into it, is not what its plan says."""


@dataclass(frozen=True)
class ShardPlan:
    """The people of one file. Fine-tuning takes them in groups of `people_per_group`, in this order."""

    index: int
    start: int  # position of the first
    identities: tuple[str, ...]
    people_per_group: int

    @property
    def name(self) -> str:
        return shard_name(self.index)

    @property
    def positions(self) -> range:
        return range(self.start, self.start + len(self.identities))

    def group_of(self, position: int) -> int:
        """Index within the shard of the group that fine-tunes `position`."""
        if position not in self.positions:
            raise CorpusError(f"position {position} is none of shard {self.name}, which holds {self.positions}")
        return (position - self.start) // self.people_per_group


def shard_name(index: int) -> str:
    return f"{index:05d}"


_NUMBERED = re.compile(r"([0-9]{5}|[1-9][0-9]{5,})\.(parquet|safetensors)")


def file_index(name: str, suffix: str = "parquet") -> int | None:
    """The number of a file that a corpus wrote, as `00012.parquet`; None for any other name (`._00012.parquet`, a copy)."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found and found[2] == suffix else None


@dataclass(frozen=True)
class Plan:
    """Identities in parts, each sorted; a shard never reaches over the end of a part."""

    parts: tuple[tuple[str, ...], ...]
    people_per_group: int
    groups_per_shard: int

    def __post_init__(self) -> None:
        if self.people_per_group < 1 or self.groups_per_shard < 1:
            raise ValueError(
                f"people_per_group and groups_per_shard must be at least 1, "
                f"not {self.people_per_group} and {self.groups_per_shard}"
            )

    @property
    def people_per_shard(self) -> int:
        return self.people_per_group * self.groups_per_shard

    @cached_property
    def identities(self) -> tuple[str, ...]:
        return tuple(identity for part in self.parts for identity in part)

    @cached_property
    def shards(self) -> tuple[ShardPlan, ...]:
        return tuple(self._shards())

    def _shards(self) -> Iterator[ShardPlan]:
        index = start = 0
        for part in self.parts:
            for first in range(0, len(part), self.people_per_shard):
                identities = part[first : first + self.people_per_shard]
                yield ShardPlan(index, start, identities, self.people_per_group)
                index, start = index + 1, start + len(identities)

    def new_part(self, identities: Collection[str]) -> tuple[str, ...]:
        """Those of `identities` who have no position yet, sorted by code point."""
        known = set(self.identities)
        return tuple(sorted(identity for identity in set(identities) if identity not in known))
