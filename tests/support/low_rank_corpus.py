"""A corpus without pictures, for tests of training: vectors of low rank that depend on the embedding, as LoRAs should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_diffusion.corpus import (
    CorpusReader,
    Failure,
    Manifest,
    Person,
    ShardWriter,
    extend_plan,
    finish_corpus,
    open_corpus,
)
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store

LAYOUT = LoRALayout.from_shapes(
    {"a.to_q": (20, 16), "a.to_v": (24, 16)}, rank=1, alpha=1.0, target_modules=("to_q", "to_v")
)
RECIPE = {"groups": {"people_per_group": 8, "groups_per_shard": 1}, "finetune": {"steps": 80, "seed": 0}}
BASE = {"name": "none", "fingerprint": "0123456789abcdef"}


def write_corpus(
    store: Store,
    count: int,
    layout: LoRALayout = LAYOUT,
    rank: int = 4,
    noise: float = 0.1,
    dtype: str = "float32",
    bad: dict[int, str] | None = None,
    finish: bool = True,
    names: Sequence[str] | None = None,
    **made_with: Any,
) -> CorpusReader:
    """`count` people. `bad`: position -> nan (vector), zero (embedding), photo (NaN in one photo's embedding) or failed (no
    LoRA). A of the first module is the same for everybody, as with `train_A: false`. Photos lie around their mean, three of
    every second person, two of the others. `made_with`: fields of the manifest."""
    bad = bad or {}
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(rank, layout.size)) / np.sqrt(rank)
    towards = rng.normal(size=(512, rank))
    manifest = open_corpus(store, Manifest(**{"layout": layout.to_dict(), "base": BASE, "recipe": RECIPE, **made_with}))
    reader = CorpusReader(store)
    plan = extend_plan(store, reader.plan, names or [f"person-{i:06d}" for i in range(count)])
    writer = ShardWriter(store, manifest, dtype)
    for shard in plan.shards:
        if shard.index in reader.shards:
            continue
        people, failures = [], []
        for position, identity in zip(shard.positions, shard.identities, strict=True):
            kind = bad.get(position, "")
            if kind == "failed":
                failures.append(Failure(position, identity, None, "embed", "no_face", "no photo shows a face"))
                continue
            draw = np.random.default_rng([1, position])
            embedding = draw.normal(size=512)
            embedding /= np.linalg.norm(embedding)
            vector = embedding @ towards @ basis + noise * draw.normal(size=layout.size) + 0.5
            vector[: layout.entries[0].in_features] = 0.25
            off = draw.normal(size=512) / np.sqrt(512)
            off -= off @ embedding * embedding
            photos = np.stack([embedding + off, embedding - off, embedding][: 2 + position % 2])
            photos /= np.linalg.norm(photos, axis=1, keepdims=True)
            person = Person(
                position=position,
                identity=identity,
                vector=vector.astype(np.float32),
                embedding=embedding.astype(np.float32),
                photo_embeddings=photos.astype(np.float32),
                similarity=float(draw.uniform(0.2, 0.9)),
                base_similarity=0.1,
                photo_similarity=0.8,
                loss=0.2,
                steps=80,
                seed=0,
                num_photos=len(photos),
                num_photos_dropped=0,
                photo_sha256=("ab", "cd", "ef")[: len(photos)],
                embed_seconds=0.1,
                finetune_seconds=1.0,
                score_seconds=0.2,
            )
            if kind == "nan":
                person.vector[3] = np.nan
            if kind == "photo":
                person.photo_embeddings[1, 7] = np.nan
            if kind == "zero":
                person = replace(person, embedding=np.zeros(512, np.float32))
            people.append(person)
        writer.commit(shard, people, failures)
    infos, problems = CorpusReader(store).verify()
    assert not problems
    if finish:
        finish_corpus(store, manifest, infos)
    return CorpusReader(store)
