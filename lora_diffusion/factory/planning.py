"""Before the work: who is there, who is done already, what is left, and what it will cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_diffusion.corpus import (
    CorpusReader,
    Manifest,
    Plan,
    ShardInfo,
    ShardPlan,
    extend_plan,
    open_corpus,
    tombstone,
)
from lora_diffusion.corpus.forget import FOLDERS, follow_tombstones
from lora_diffusion.corpus.reader import NO_STATISTICS
from lora_diffusion.corpus.tombstone import is_tombstone, make_key, not_forgotten
from lora_diffusion.corpus.writer import restore_statistics
from lora_diffusion.factory import report
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import Found, PersonRef, open_people
from lora_diffusion.places import SYNTHETIC
from lora_diffusion.storage import Store, open_store


class Listed(dict[str, PersonRef]):
    """People by identity, sorted. `found`: what the whole source holds, and what of it was skipped and why; beyond: whom a limit
    leaves out."""

    found: Found | None = None
    beyond: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CorpusRun:
    """A corpus that is ready to be worked on: everybody has a position, and it is known which shards are done."""

    config: CorpusConfig
    store: Store
    manifest: Manifest | None  # None: of a preview, while the models are not on this machine
    plan: Plan
    people: Listed  # of the source, now
    done: Sequence[ShardInfo]
    damaged: Mapping[int, str]  # index -> what is wrong; these are made again

    @property
    def todo(self) -> list[ShardPlan]:
        done = {info.index for info in self.done}
        return [shard for shard in self.plan.shards if shard.index not in done]

    def work(self) -> list[tuple[ShardPlan, list[PersonRef]]]:
        """Each shard that is to be made, and where its people are."""
        return [(shard, [find(self.people, name) for name in shard.identities]) for shard in self.todo]

    def workers(self, resources: Mapping[str, float]) -> int:
        """Size of the pool: what was asked for, or what `resources` hold now; never more than there are shards."""
        need = self.config.workers
        count = need.finetune_max
        if not count and need.finetune_gpus:
            count = math.floor(resources.get("GPU", 0) / need.finetune_gpus + 1e-6)
        elif not count:
            free = resources.get("CPU", 1) - need.embed_min * need.embed_cpus
            count = math.floor(free / need.finetune_cpus + 1e-6)
        return max(1, min(count, len(self.todo)))

    def describe(self, workers: int) -> str:
        """The plan in words, with the cost of what is left."""
        plan, manifest, todo = self.plan, self.manifest, self.todo
        lines = [f"shard {index} {problem}: it will be made again" for index, problem in self.damaged.items()]
        if self.people.found:
            lines.append(f"{self.config.people}: {self.people.found}")
        lines.append(
            f"{len(plan.identities)} people of {self.config.people} in {len(plan.shards)} shard{'s' * (len(plan.shards) != 1)} of "
            f"{plan.people_per_shard}, {len(self.done)} of them done -> {self.config.output}"
        )
        if manifest is not None:
            lines.append(
                f"base model {manifest.base['name']} ({manifest.base['fingerprint']}), layout {manifest.layout_id}: "
                f"{manifest.vector_size:,} floats a LoRA, {self.config.people_per_group} people fine-tuned together"
            )
        if todo:
            measured = report.measured_seconds(CorpusReader(self.store)) if self.done else None
            people = sum(len(shard.identities) for shard in todo)
            size = None if manifest is None else manifest.vector_size
            lines.append("cost: " + report.estimate(self.config, people, size, workers, measured))
        return "\n".join(lines)


def as_begun(config: CorpusConfig) -> CorpusConfig:
    """`config`, as the corpus at its output was begun with: an earlier release knew fewer settings."""
    there = Manifest.find(open_store(config.output))
    return config if there is None else config.as_begun(there.recipe)


def begin(config: CorpusConfig, wanted: Manifest, people: Listed) -> CorpusRun:
    """Begin or continue the corpus at `config.output`. Only one driver may do so at a time.

    Raises CorpusConflict if the corpus there has another recipe, StoreError if it cannot be read or written.
    """
    store = open_store(config.output)
    manifest = open_corpus(store, wanted)
    for folder in FOLDERS:
        store.sweep(folder)
    make_key(store, CorpusReader(store).plan.identities)
    follow_tombstones(store)
    reader = CorpusReader(store)
    _check_limit(reader, people)
    plan = extend_plan(store, reader.plan, list(people))
    done, damaged = reader.verify(plan.shards)
    if without := [index for index, problem in damaged.items() if problem == NO_STATISTICS]:
        for index in without:
            restore_statistics(store, index)
        done, damaged = reader.verify(plan.shards)
    return CorpusRun(config, store, manifest, plan, people, done, damaged)


def preview(config: CorpusConfig, wanted: Manifest | None, people: Listed) -> CorpusRun:
    """What `begin` would find; writes nothing. `wanted` None: the corpus that is there is not compared."""
    store = open_store(config.output)
    plan = Plan((), config.people_per_group, config.groups_per_shard)
    done: Sequence[ShardInfo] = ()
    damaged: Mapping[int, str] = {}
    if store.exists("corpus.json"):
        reader = CorpusReader(store)
        wanted = open_corpus(store, wanted or reader.manifest)  # it is there, so this only compares
        _check_limit(reader, people)
        plan, (done, damaged) = reader.plan, reader.verify()
    part = plan.new_part(not_forgotten(store, plan.identities, list(people)))
    plan = dataclasses.replace(plan, parts=(*plan.parts, part)) if part else plan
    return CorpusRun(config, store, wanted, plan, people, done, damaged)


def _check_limit(reader: CorpusReader, people: Listed) -> None:
    """Raises ValueError if an earlier run planned people whom `limit` leaves out now, and did not come to them."""
    if people.beyond.intersection(reader.plan.identities):
        done = {info.index for info in reader.verify()[0]}
        left = [name for shard in reader.plan.shards if shard.index not in done for name in shard.identities]
        if count := len(people.beyond.intersection(left)):
            raise ValueError(
                f"limit leaves out {count:,} people whom an earlier run planned at {reader.store.uri} and did not come to. Give the command "
                "without it; for a corpus of fewer people choose another output"
            )


def number_of_synthetic(people: str) -> int:
    """40 of `synthetic:40`; 0 for the address of a source. Raises ValueError for anything else after the colon."""
    if not people.startswith(SYNTHETIC):
        return 0
    number = people.removeprefix(SYNTHETIC)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"people={people}: how many synthetic people? Give a number, as in people=synthetic:40")
    return int(number)


def people_folder(people: str, output: str) -> str:
    """Where the photos of a corpus at `output` lie: `people`, or a folder beside the corpus if these are synthetic."""
    return f"{output}-people" if number_of_synthetic(people) else people


def list_people(config: CorpusConfig) -> Listed:
    """Everyone in the source, up to `config.limit`. Raises ValueError if there is nobody with a photo."""
    source = open_people(config.people)
    people = sorted(source.list_people(), key=lambda person: person.identity)
    if not source.found.people:
        reasons = "".join(f"\n{person.problem[1]}" for person in people[:3] if person.problem)
        raise ValueError(f"nobody in {config.people} has a photo that can be used: {source.found}{reasons}")
    listed = Listed({person.identity: person for person in people[: config.limit]})
    listed.beyond = frozenset(person.identity for person in people[len(listed) :])
    listed.found = source.found
    return listed


def find(people: Mapping[str, PersonRef], identity: str) -> PersonRef:
    """The person, or one whose photos are gone since an earlier run planned them."""
    problem = ("photos_gone", "planned by an earlier run, but no longer in the source")
    if is_tombstone(identity):
        problem = (tombstone.REASON, tombstone.MESSAGE)
    return people.get(identity, PersonRef(identity, problem=problem))
