"""Make a trained synthesiser ready for others: how to draw with it, attribute directions for `edit`, half the size.

    jobs/publish.py synthesizer=runs/tiny/training/synthesizer output=runs/tiny/published draw.guidance_scale=2
    jobs/publish.py synthesizer=s3://bucket/training/synthesizer output=face-loras corpus=s3://bucket/corpus \\
        labels=labels.parquet neighbours=false

labels: a Parquet file with `identity` and one column of numbers for each attribute (null: unknown), or `synthetic` for the
people of jobs/world/make_faces.py. Directions are fitted on what the synthesiser itself answers to the corpus' embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lora_diffusion.places import Output, Place, PlaceOrName
from lora_diffusion.synthesis.publish import Labels, checked, publish


@dataclass(frozen=True)
class Config:
    """synthesizer: what jobs/train.py wrote. output: a copy for others. draw: settings of `LatentSampling`.

    corpus: of the people with labels. neighbours: keep the corpus' embeddings, which are biometric data.
    """

    synthesizer: PlaceOrName
    output: Output
    draw: dict[str, Any] = field(default_factory=dict)
    corpus: Place | None = None
    labels: PlaceOrName | None = None
    neighbours: bool = True
    dtype: Literal["float16", "float32", "int8"] = "float16"  # int8: float16, and learned components in bytes
    components: int | None = (
        None  # keep only so many learned components, those that the corpus' people need most; null: all
    )


def dry_run(config: Config) -> str:
    draw, labels = _read(config)
    synthesizer = checked(config.synthesizer, draw, config.corpus, labels, config.components)
    return f"{synthesizer!r} of {config.synthesizer} -> {config.output}"


def run(config: Config, ray_address: str) -> None:
    draw, labels = _read(config)
    dtype = getattr(torch, config.dtype)
    published = publish(
        config.synthesizer, config.output, draw, config.corpus, labels, config.neighbours, dtype, config.components
    )
    if config.labels and published.directions is not None:
        told = zip(published.directions.names, published.directions.separation_A.tolist(), strict=True)
        print("correlation with the labels: " + ", ".join(f"{name} {value:.2f}" for name, value in told))
    print(f"published: {config.output}")


def _read(config: Config) -> tuple[dict[str, str], str | Labels | None]:
    """Settings of drawing as text, and the labels."""
    draw = {key: str(value) for key, value in config.draw.items()}
    if config.labels != "synthetic" or not config.corpus:
        return draw, config.labels
    from lora_diffusion.jobs.synthetic import synthetic_labels

    return draw, synthetic_labels(config.corpus)
