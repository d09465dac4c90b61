"""Before the work: who is there, who is done already, what is left, and what it will cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_diffusion.corpus import CorpusReader, Manifest, Plan, ShardInfo, ShardPlan, extend_plan, open_corpus
from lora_diffusion.factory import report
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import PersonRef, open_people
from lora_diffusion.storage import Store, open_store


@dataclass(frozen=True)
class Begun:
    """A corpus that is ready to be worked on: everybody has a position, and it is known which shards are done."""

    store: Store
    manifest: Manifest
    plan: Plan
    done: tuple[ShardInfo, ...]
    damaged: Mapping[int, str]  # index -> what is wrong; these are made again

    @property
    def todo(self) -> list[ShardPlan]:
        done = {info.index for info in self.done}
        return [shard for shard in self.plan.shards if shard.index not in done]


def begin(config: CorpusConfig, wanted: Manifest, people: Iterable[str]) -> Begun:
    """Begin or continue the corpus at `config.output`. Only one driver may do so at a time.

    Raises CorpusConflict if the corpus there has another recipe, StoreError if it cannot be read or written.
    """
    store = open_store(config.output)
    manifest = open_corpus(store, wanted)
    for folder in ("", "plan", "shards", "failures", "statistics"):
        store.sweep(folder)
    reader = CorpusReader(store)
    plan = extend_plan(store, reader.plan, list(people))
    done, damaged = reader.verify(plan.shards)
    return Begun(store, manifest, plan, tuple(done), damaged)


def preview(config: CorpusConfig, wanted: Manifest, people: Iterable[str]) -> Begun:
    """What `begin` would find; writes nothing."""
    store = open_store(config.output)
    if store.exists("corpus.json"):
        manifest = open_corpus(store, wanted)  # it is there, so this only compares
        reader = CorpusReader(store)
        plan, (done, damaged) = reader.plan, reader.verify()
    else:
        manifest, plan = wanted, Plan((), config.people_per_group, config.groups_per_shard)
        done, damaged = [], {}
    part = plan.new_part(list(people))
    plan = dataclasses.replace(plan, parts=(*plan.parts, part)) if part else plan
    return Begun(store, manifest, plan, tuple(done), damaged)


def describe(config: CorpusConfig, begun: Begun, workers: int) -> str:
    """The plan in words, with the cost of what is left."""
    plan, manifest, todo = begun.plan, begun.manifest, begun.todo
    lines = [f"shard {index} {problem}: it will be made again" for index, problem in begun.damaged.items()]
    lines.append(
        f"{len(plan.identities)} people of {config.people} in {len(plan.shards)} shards of {plan.people_per_shard}, "
        f"{len(begun.done)} of them done -> {config.output}"
    )
    lines.append(
        f"base model {manifest.base['name']} ({manifest.base['fingerprint']}), layout {manifest.layout_id}: "
        f"{manifest.vector_size:,} floats a LoRA, {config.people_per_group} people fine-tuned together"
    )
    if todo:
        measured = report.measured_seconds(CorpusReader(begun.store)) if begun.done else None
        people = sum(len(shard.identities) for shard in todo)
        lines.append("cost: " + report.estimate(config, people, manifest.vector_size, workers, measured))
    return "\n".join(lines)


def list_people(config: CorpusConfig) -> dict[str, PersonRef]:
    """Everyone in the source by identity, sorted, up to `config.limit`. Raises ValueError if there is nobody."""
    people = sorted(open_people(config.people).list_people(), key=lambda person: person.identity)
    if not people:
        raise ValueError(f"nobody in {config.people}: expected {config.people}/<identity>/*.jpg")
    return {person.identity: person for person in people[: config.limit]}


def find(people: Mapping[str, PersonRef], identity: str) -> PersonRef:
    """The person, or one whose photos are gone since an earlier run planned them."""
    gone = PersonRef(identity, problem=("photos_gone", "planned by an earlier run, but no longer in the source"))
    return people.get(identity, gone)


def must_render(config: CorpusConfig) -> bool:
    """Whether `people` is to be rendered first: asked for, and not there, or its rendering was interrupted."""
    if not config.render_people:
        return False
    store = open_store(config.people)
    return not store.exists("faces.parquet") and (store.exists("faces.json") or not (store.folders() or store.files()))


def finetune_workers(config: CorpusConfig, resources: Mapping[str, float], shards: int) -> int:
    """Size of the pool: what was asked for, or what the cluster holds now; never more than there are shards."""
    need = config.workers
    count = need.finetune_max
    if not count and need.finetune_gpus:
        count = math.floor(resources.get("GPU", 0) / need.finetune_gpus + 1e-6)
    elif not count:
        free = resources.get("CPU", 1) - need.embed_min * need.embed_cpus
        count = math.floor(free / need.finetune_cpus + 1e-6)
    return max(1, min(count, shards))
