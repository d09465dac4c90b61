"""What a person wants to know: what it costs before, the summary after."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.training.meter import duration, in_bytes

_BYTES_BESIDE_VECTOR = 512 * 4 + 1000  # embedding, and the other columns, roughly


def estimate(config: CorpusConfig, people: int, vector_size: int | None, workers: int, measured: float | None) -> str:
    """What `people` more people will cost: time, and bytes if it is known how long a vector is."""
    each = measured if measured is not None else config.seconds_per_lora
    how = "measured on this corpus" if measured is not None else "stated by seconds_per_lora"
    text = (
        f"{people} LoRAs × {each:.2f} s ({how}) / {workers} worker{'s' * (workers != 1)} = "
        f"about {duration(people * each / max(1, workers))}"
    )
    if vector_size is None:
        return text
    return f"{text}, {in_bytes(people * (vector_size * np.dtype(config.vector_dtype).itemsize + _BYTES_BESIDE_VECTOR))}"


def measured_seconds(reader: CorpusReader, shards: int = 8) -> float | None:
    """Mean seconds for one LoRA on one worker, over the first shards of what there is; None without any."""
    rows = []
    for _, table in zip(range(shards), reader.tables(["finetune_seconds", "score_seconds"]), strict=False):
        rows += [row["finetune_seconds"] + row["score_seconds"] for row in table.to_pylist()]
    return float(np.mean(rows)) if rows else None


def summary(reader: CorpusReader, made: int, seconds: float) -> str:
    """The end of a run: who is done, who failed and why, how fast, and how alike."""
    counts = reader.manifest.counts
    lines = [
        f"{counts['num_people']} people done, {counts['num_failed']} failed{_reasons(counts['failed_by_reason'])}",
        f"photos left out: {sum(counts['photos_dropped_by_reason'].values())}{_reasons(counts['photos_dropped_by_reason'])}",
    ]
    if kept := counts.get("photos_kept_by_reason"):
        lines.append(f"photos with a fault that were used: {sum(kept.values())}{_reasons(kept)}")
    if made:
        lines.append(f"{made} LoRAs made in {duration(seconds)}: {made / seconds:.2f} LoRAs/s")
    if counts["num_people"]:
        table = reader.table(["similarity", "base_similarity", "photo_similarity"])
        columns = {name: np.array(table[name].to_pylist(), np.float64) for name in table.column_names}
        if np.isfinite(columns["similarity"]).any():
            lines += [
                "similarity of renders with the person's photos (cosine):",
                f"  fine-tuned      {_spread(columns['similarity'])}",
                f"  base model      {_spread(columns['base_similarity'])}",
                f"  photos, pairs   {_spread(columns['photo_similarity'])}",
                *histogram(columns["similarity"]),
            ]
    return "\n".join(lines)


def histogram(values: np.ndarray, bins: int = 10, width: int = 40) -> list[str]:
    """A distribution in text: one line for each tenth of its range."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins=bins)
    return [
        f"  {low:+.2f} .. {high:+.2f} {'█' * math.ceil(width * count / max(1, counts.max()))} {count}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


def _spread(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"mean {values.mean():.3f}, 5 % {low:.3f}, median {middle:.3f}, 95 % {high:.3f}"


def _reasons(reasons: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{number} × {reason}' for reason, number in reasons.items())})" if reasons else ""
