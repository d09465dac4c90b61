"""The dataset card of a corpus: `README.md`, whose front matter tells `datasets` and the Hub where the rows lie.

Without it they would read `plan/` and `shards/` as one table. https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.plan import shard_name
from lora_diffusion.corpus.reader import ShardInfo
from lora_diffusion.storage import Store

FILE = "README.md"
MARK = "<!-- Written anew when the corpus changes. Delete this line to keep what you edit. -->"
_CARD = """---
pretty_name: LoRAs of {people} people
license: other
tags: [lora, stable-diffusion, weight-space, faces]
configs:
{configs}---
{mark}

# LoRAs of {people} people

One row a person: a LoRA for `{base}` ({size:,} numbers, layout `{layout_id}`, rank {rank}), an ArcFace embedding of the photos, and
how similar pictures drawn with the LoRA are to them. Embeddings and LoRAs of real people are biometric data: publish
them only with consent, and set the licence above.

```python
datasets.load_dataset("path/or/repo")                      # split "train"
pandas.read_parquet("path/shards")
duckdb.sql("select identity, similarity from 'path/shards/*.parquet' order by similarity desc")
lora_diffusion.corpus.CorpusReader("path").vectors()       # (people, {size}), and layout, statistics, failures
```

| | |
|---|---|
| people with a LoRA | {people} |
| without one, by reason (`failures/`) | {failed} |
| base model | {base}, fingerprint `{fingerprint}` |
| recipe | `{recipe_id}`, in full in `corpus.json` |
"""


def write_card(store: Store, manifest: Manifest, infos: Sequence[ShardInfo]) -> None:
    keep_or_write(store, card(manifest, infos))


def keep_or_write(store: Store, text: str) -> None:
    """Write `README.md` if it would change and is ours: a user who deletes its mark keeps their own."""
    try:
        there = store.read(FILE).decode(errors="replace")
    except FileNotFoundError:
        there = MARK
    if MARK in there and there != text:
        store.write(FILE, text.encode())


def card(manifest: Manifest, infos: Sequence[ShardInfo]) -> str:
    """The text for a manifest with its counts. A pattern that fits no file would be an error to `datasets`."""
    failures = [info.index for info in infos if info.failures]
    configs = _config("people", "shards", [info.index for info in infos], default=True)
    configs += _config("failures", "failures", failures) if failures else ""
    people, failed = manifest.counts["num_people"], manifest.counts["failed_by_reason"]
    return _CARD.format(
        people=people,
        configs=configs,
        mark=MARK,
        base=manifest.base.get("name", "?"),
        fingerprint=manifest.base["fingerprint"],
        size=manifest.vector_size,
        layout_id=manifest.layout_id,
        rank=manifest.layout["rank"],
        failed=", ".join(f"{count} {reason}" for reason, count in failed.items()) or "none",
        recipe_id=manifest.recipe_id,
    )


def _config(name: str, folder: str, indices: Sequence[int], default: bool = False) -> str:
    """Globs that leave `00000 (1).parquet` and `._00000.parquet` alone: one for each number of digits."""
    globs = [f"{folder}/{'[0-9]' * digits}.parquet" for digits in sorted({len(shard_name(i)) for i in indices})]
    lines = [f"- config_name: {name}", *(["  default: true"] if default else []), "  data_files:"]
    return "".join(f"{line}\n" for line in [*lines, *(f'  - "{glob}"' for glob in globs)])
