"""Make a trained synthesiser ready for others: how to draw with it, attribute directions for `edit`, half the size.

    jobs/publish.py synthesizer=runs/tiny/training/synthesizer output=runs/tiny/published draw.guidance_scale=2
    jobs/publish.py synthesizer=s3://bucket/training/synthesizer output=face-loras corpus=s3://bucket/corpus \\
        labels=labels.parquet neighbours=false

labels: a Parquet file with `identity` and one column of numbers for each attribute (null: unknown), or `synthetic` for the
people of jobs/world/make_faces.py. Directions are fitted on what the synthesiser itself answers to the embeddings of `corpus`, or
of the photos in `people` (as of jobs/build_corpus.py), which it then embeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lora_diffusion.artifacts.identity import Identity, read_identity
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.places import Output, Place, PlaceOrName
from lora_diffusion.synthesis.publish import Embedded, Labels, checked, publish


@dataclass(frozen=True)
class Config:
    """synthesizer: what jobs/train.py wrote. output: a copy for others. draw: keys of `latent_sampling` of jobs/train.py.

    corpus, people: where those with labels are, one of the two. labels: Parquet, or `synthetic`; null: no attribute directions.
    neighbours: keep the corpus' embeddings, which are biometric data.
    components: keep only so many learned components, those that the corpus' people need most; null: all.
    """

    synthesizer: PlaceOrName
    output: Output
    draw: dict[str, Any] = field(default_factory=dict)
    corpus: Place | None = None
    people: Place | None = None
    labels: PlaceOrName | None = None
    neighbours: bool = True
    dtype: Literal["float16", "float32", "int8"] = "float16"  # int8: float16, and learned components in bytes
    components: int | None = None


def dry_run(config: Config) -> str:
    draw = {key: str(value) for key, value in config.draw.items()}
    synthesizer = checked(config.synthesizer, draw, *_labelled(config), config.components)
    return f"{synthesizer!r} of {config.synthesizer} -> {config.output}"


def run(config: Config, ray_address: str) -> None:
    draw = {key: str(value) for key, value in config.draw.items()}
    dtype = getattr(torch, config.dtype)
    published = publish(
        config.synthesizer, config.output, draw, *_labelled(config), config.neighbours, dtype, config.components
    )
    if config.labels and published.directions is not None:
        told = zip(published.directions.names, published.directions.separation_A.tolist(), strict=True)
        print("correlation with the labels: " + ", ".join(f"{name} {value:.2f}" for name, value in told))
    print(f"published: {config.output}")


def _labelled(config: Config) -> tuple[str | Embedded | None, str | Labels | None]:
    """The people, and their labels. Raises ValueError."""
    if config.corpus and config.people:
        raise ValueError("corpus and people are two places of those with labels: name one of them")
    people = _of_photos(config.people, read_identity(config.synthesizer)) if config.people else config.corpus
    if config.labels != "synthetic" or people is None:
        return people, config.labels
    from lora_diffusion.jobs.synthetic import synthetic_labels

    return people, synthetic_labels(
        people.identities if isinstance(people, Embedded) else CorpusReader(people).identities
    )


def _of_photos(uri: str, identity: Identity) -> Embedded:
    from lora_diffusion.faces.embedder import EmbedderConfig
    from lora_diffusion.factory.config import CorpusConfig
    from lora_diffusion.factory.embed import PersonEmbedder
    from lora_diffusion.factory.people import open_people

    listed = sorted(open_people(uri).list_people(), key=lambda person: person.identity)

    def embed(places: list[int]) -> tuple[list[int], NDArray[np.float32]]:
        work = PersonEmbedder(
            CorpusConfig(people=uri, output="", embedder=EmbedderConfig(identity.recogniser_name)), 64
        )
        identity.check_recogniser(work.embedder, "the synthesiser")
        found = {place: work(place, listed[place]).embedding for place in places}
        usable = {place: vector for place, vector in found.items() if vector is not None}
        return list(usable), np.array(list(usable.values()), np.float32)

    return Embedded(uri, [person.identity for person in listed], embed)
