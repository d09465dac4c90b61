"""A trained synthesiser made ready for others: how to draw with it, attribute directions, half the size.

Axes: P people, C embedding, Z code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.corpus.reader import opened
from lora_diffusion.places import place
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.codes import LearnedCodes
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.synthesis.synthesizer import Synthesizer

Labels = dict[str, dict[str, float]]  # identity -> attribute -> value


@dataclass(frozen=True)
class Embedded:
    """People for directions, wherever they come from. where: as messages name it. embed: places among `identities` -> those of them
    who have an embedding, and their embeddings (P, C) by the synthesiser's recogniser."""

    where: str
    identities: Sequence[str]
    embed: Callable[[list[int]], tuple[list[int], NDArray[np.float32]]]


def publish(
    source: str,
    out: str,
    draw: Mapping[str, str],
    corpus: str | Embedded | None = None,
    labels: str | Labels | None = None,
    neighbours: bool = True,
    dtype: torch.dtype = torch.float16,
    components: int | None = None,
) -> Synthesizer:
    """Write the folder `out` from the folder `source`, both local or s3://; returns what was written.

    draw: settings of `LatentSampling`, as text. corpus: its address, or other people. labels: what `directions` takes. neighbours: keep the corpus' embeddings.
    components: keep only so many of learned components, those that the LoRAs of the corpus' embeddings need most.

    Raises ValueError for unknown settings, labels without a corpus, or a corpus nobody of whom has labels.
    """
    synthesizer = checked(source, draw, corpus, labels, components)
    space, people = synthesizer.codes, synthesizer.neighbours
    if components is not None and isinstance(space, LearnedCodes) and people is not None:
        drawn_PZ = synthesizer.denoise(people.embeddings_PC, range(len(people.embeddings_PC)))
        synthesizer.codes = space.truncated(components, torch.from_numpy(drawn_PZ))
    if corpus is not None and labels is not None:
        synthesizer.directions = directions(synthesizer, corpus, labels)
    if not neighbours:
        synthesizer.neighbours = None
    synthesizer.save_pretrained(out, dtype)
    return synthesizer


def checked(
    source: str,
    draw: Mapping[str, str],
    corpus: str | Embedded | None = None,
    labels: str | Labels | None = None,
    components: int | None = None,
) -> Synthesizer:
    """The synthesiser with these settings, after a look at all that `publish` is going to read. Raises as it does."""
    if (corpus is None) != (labels is None):
        raise ValueError("corpus and labels belong together: the people, and what they look like")
    synthesizer = Synthesizer.from_pretrained(source)
    how = synthesizer.latent_sampling
    if unknown := [key for key in draw if not hasattr(how, key)]:
        raise ValueError(f"draw has no setting {unknown[0]!r}; there are {', '.join(vars(how))}")
    values = {key: type(getattr(how, key))(text) for key, text in draw.items()}
    synthesizer.latent_sampling = replace(how, **values)
    if components is not None and (not isinstance(synthesizer.codes, LearnedCodes) or synthesizer.neighbours is None):
        raise ValueError("components can be left out of a synthesiser that learned from pictures and has neighbours")
    if corpus is not None and labels is not None:
        _labelled(synthesizer, corpus, labels)
    return synthesizer


def directions(synthesizer: Synthesizer, corpus: str | Embedded, labels: str | Labels) -> AttributeDirections:
    """Fitted on what the synthesiser answers to the people's mean embeddings at temperature 0, without guidance.

    labels: a table, or a Parquet file with `identity` and a column of numbers for each attribute (null: unknown).
    """
    people, of, known = _labelled(synthesizer, corpus, labels)
    known, embeddings_PC = people.embed(known)
    if not known:
        raise ValueError(f"nobody of {people.where} who is in the labels has a usable photo")
    codes_PZ = synthesizer.denoise(embeddings_PC, [0] * len(known), guidance_scale=1.0, temperature=0.0)
    rows = [of[people.identities[place]] for place in known]
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    return AttributeDirections.fit(torch.from_numpy(codes_PZ), columns)


def _labelled(
    synthesizer: Synthesizer, corpus: str | Embedded, labels: str | Labels
) -> tuple[Embedded, Mapping[str, Mapping[str, float]], list[int]]:
    """The people, the labels by identity, and the places of those who have some. Raises ValueError if nobody has."""
    people = corpus if isinstance(corpus, Embedded) else _of_corpus(synthesizer, corpus)
    of = read_labels(labels) if isinstance(labels, str) else labels
    known = [place for place, identity in enumerate(people.identities) if identity in of]
    if not known:
        where = labels if isinstance(labels, str) else "the labels"
        raise ValueError(f"nobody of {people.where} is in {where}: the identities must be the names there")
    return people, of, known


def _of_corpus(synthesizer: Synthesizer, corpus: str) -> Embedded:
    reader = CorpusReader(corpus)
    way_out = "Give the corpus that it was trained on, or people embedded by its recogniser"
    theirs, parts = f"the corpus at {corpus}", ("recogniser",)
    synthesizer.identity.check(reader.manifest.identity, "the synthesiser", theirs, way_out, parts)
    return Embedded(corpus, reader.identities, lambda places: (places, reader.embeddings()[places]))


def read_labels(path: str) -> Labels:
    """Raises ValueError if it is no Parquet file with a column `identity` and numbers."""
    folder, _, name = place(path).rpartition("/")
    with opened(open_store(folder or "/"), name) as file:
        rows = pq.read_table(file, page_checksum_verification=True).to_pylist()
        if not rows or "identity" not in rows[0]:
            raise ValueError("it has no column `identity`")
        return {
            row["identity"]: {k: float("nan") if v is None else float(v) for k, v in row.items() if k != "identity"}
            for row in rows
        }
