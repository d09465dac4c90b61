"""A corpus of nine people in three shards, without pictures: `cy` has no face, and one photo of `bo` was left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_diffusion.corpus import (
    CorpusReader,
    Failure,
    Manifest,
    Person,
    ShardPlan,
    ShardWriter,
    extend_plan,
    finish_corpus,
    open_corpus,
)
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store

LAYOUT = LoRALayout.from_shapes(
    {"a.to_q": (5, 4), "a.to_v": (6, 4)}, rank=1, alpha=1.0, target_modules=("to_q", "to_v")
)
RECIPE = {"groups": {"people_per_group": 2, "groups_per_shard": 2}, "finetune": {"steps": 80, "seed": 0}}
MANIFEST = Manifest(LAYOUT.to_dict(), {"name": "tiny-sd", "fingerprint": "0123456789abcdef"}, RECIPE)
OTHER = replace(MANIFEST, recipe={**RECIPE, "finetune": {"steps": 90, "seed": 0}})  # of the same layout
NAMES = ["ana", "../x", "a/b", "Zoë 😀", "bo", "cy", "dee", "ed", "flo"]


def make(shard: ShardPlan) -> tuple[list[Person], list[Failure]]:
    """The people of a shard; `cy` has no face, and one photo of `bo` was left out."""
    people, failures = [], []
    for position, identity in zip(shard.positions, shard.identities, strict=True):
        if identity == "cy":
            failures.append(Failure(position, identity, None, "embed", "no_face", "no photo shows a face"))
            continue
        if identity == "bo":
            failures.append(Failure(position, identity, "2.jpg", "read", "truncated", "the file ends early"))
        rng = np.random.default_rng(position)
        people.append(
            Person(
                position=position,
                identity=identity,
                vector=rng.normal(1.0, 0.1, LAYOUT.size).astype(np.float32),
                embedding=rng.normal(size=512).astype(np.float32),
                photo_embeddings=rng.normal(size=(3, 512)).astype(np.float32),
                similarity=0.5,
                base_similarity=0.1,
                photo_similarity=float("nan"),
                loss=0.2,
                steps=80,
                seed=0,
                num_photos=2,
                num_photos_dropped=0,
                photo_sha256=("ab", "cd"),
                embed_seconds=0.1,
                finetune_seconds=1.0,
                score_seconds=0.2,
            )
        )
    return people, failures


def build(
    store: Store, names: list[str], dtype: str = "float32", order: int = 1, manifest: Manifest = MANIFEST
) -> CorpusReader:
    """The whole job, without the work: begin or continue, commit what is missing, finish."""
    manifest = open_corpus(store, manifest)
    reader = CorpusReader(store)
    plan = extend_plan(store, reader.plan, names)
    infos, _ = reader.verify(plan.shards)
    writer = ShardWriter(store, manifest, dtype)
    for shard in plan.shards[::order]:
        if shard.index not in {info.index for info in infos}:
            writer.commit(shard, *make(shard))
    infos, problems = CorpusReader(store).verify()
    assert not problems
    finish_corpus(store, manifest, infos)
    return CorpusReader(store)
