"""A small world for tests of the corpus job: eight rendered people, a silent base model, two steps of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_pipeline import tiny_pipeline

from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader, finish_corpus
from lora_diffusion.factory import planning
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import PersonEmbedder
from lora_diffusion.factory.isolate import embed_people
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.factory.shard import ShardMaker
from lora_diffusion.world.people.dataset import FacesConfig, FacesFolder, FacesWriter

PEOPLE = range(20_000, 20_008)


def make_world(folder: Path) -> Path:
    """`people/` with two photos of each of PEOPLE, `base/` with a random pipeline of 16 px."""
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder / "base")
    people = FacesFolder(str(folder / "people"), FacesConfig(views=2))
    FacesWriter(str(folder / "people"), FacesConfig(views=2))({"numbers": people.missing(PEOPLE)})
    people.finish()
    return folder


def settings(world: Path) -> dict[str, object]:
    """As a YAML file would hold them."""
    return {
        "base": str(world / "base"),
        "people_per_group": 2,
        "photos": {"min_photos": 2},
        "lora": {"target_modules": ["to_q", "to_v"]},
        "finetune": {"steps": 2},
        "score": {"num_inference_steps": 2, "seeds_per_prompt": 1},
        "workers": {"embed_cpus": 0.1, "finetune_cpus": 0.1, "finetune_max": 1},
    }


def make_config(world: Path, **values: object) -> CorpusConfig:
    return from_dict(CorpusConfig, {**settings(world), **values})


def build_corpus(config: CorpusConfig) -> None:
    """What jobs/build_corpus.py does, without Ray."""
    source, maker = planning.list_people(config), LoRAMaker(config)
    embed = PersonEmbedder(config, maker.base.image_size)
    begun = planning.begin(config, maker.manifest(), source)
    make = ShardMaker(config, InMemoryAttempts())
    for shard in begun.todo:
        rows = [(p, planning.find(source, i)) for p, i in zip(shard.positions, shard.identities, strict=True)]
        make(shard, embed_people(embed, rows, InMemoryAttempts(), 3))
    finish_corpus(begun.store, begun.manifest, CorpusReader(begun.store).verify(begun.plan.shards)[0])
