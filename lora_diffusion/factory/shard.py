"""One shard, from embedded people to a committed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_diffusion.corpus import CorpusReader, Person, ShardInfo, ShardPlan, ShardWriter
from lora_diffusion.factory.attempts import Attempts
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.isolate import make_group
from lora_diffusion.factory.make import LoRAMaker, Maker
from lora_diffusion.storage import open_store


@dataclass(frozen=True)
class ShardReport:
    """What is told of a shard: not its rows. `failed`: identity -> reason."""

    index: int
    num_people: int
    failed: Mapping[str, str]

    @classmethod
    def of(cls, info: ShardInfo) -> ShardReport:
        failed = {failure.identity: failure.reason for failure in info.failures if failure.photo is None}
        return cls(info.index, info.num_people, failed)


class ShardMaker:
    """Fine-tunes, scores and commits whole shards. One for each worker; memory does not grow with the shards done.

    `maker`: what makes the LoRAs; default: the one of `config`.

    Raises ValueError if this worker's base model or recogniser is not the one that the corpus is made with.
    """

    def __init__(self, config: CorpusConfig, attempts: Attempts, maker: Maker | None = None) -> None:
        self.config = config
        self.attempts = attempts
        self.maker = maker or LoRAMaker(config)
        store = open_store(config.output)
        there = CorpusReader(store).manifest
        differences = there.differences(self.maker.manifest(there))
        if differences:
            raise ValueError(f"this worker differs from the corpus at {store.uri}: {'; '.join(differences)}")
        self.writer = ShardWriter(store, there, config.vector_dtype)

    def __call__(self, shard: ShardPlan, people: Sequence[EmbeddedPerson]) -> ShardReport:
        """Raises CommonFault, StoreError or DeviceError; then nothing of this shard is committed."""
        done: list[Person] = []
        failures = [failure for person in people for failure in person.failures]
        groups: dict[int, list[EmbeddedPerson]] = {}
        for person in people:
            if person.usable:
                groups.setdefault(shard.group_of(person.position), []).append(person)
        for group in groups.values():
            for answer in make_group(self.maker, group, self.attempts, self.config.workers.max_deaths):
                if isinstance(answer, Person):
                    done.append(answer)
                else:
                    failures.append(answer)
        return ShardReport.of(self.writer.commit(shard, done, failures))
