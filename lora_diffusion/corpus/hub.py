"""A corpus as a dataset of the Hugging Face Hub: `data/train-*.parquet`, a card that its viewer reads, and `lora.json`.

Left out of the rows: hashes and embeddings of single photos, and seconds. Rows go from file to file as they are read: memory is that
of one shard and of one file. https://huggingface.co/docs/hub/datasets-cards
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from lora_diffusion.corpus.card import MARK, keep_or_write
from lora_diffusion.corpus.reader import CorpusReader
from lora_diffusion.corpus.tombstone import is_tombstone, not_forgotten
from lora_diffusion.storage import Store

COLUMNS = (
    "identity",
    "similarity",
    "base_similarity",
    "photo_similarity",
    "loss",
    "num_photos",
    "consent",
    "embedding",
    "vector",
)
ROWS_OF_A_GROUP = 100  # the viewer reads whole row groups, up to 300 MB
FILE_BYTES = 256_000_000
_OURS = re.compile(r"train-\d{5}-of-\d{5}\.parquet")
_CARD = """---
{header}---
{mark}

# LoRAs of {people:,} people

One row a person: a LoRA for `{base}` as one vector of {size:,} numbers, an ArcFace embedding of the person's photos, and how similar
pictures drawn with the LoRA are to them.

**Biometric data.** Embeddings of real people, and LoRAs that draw them, identify those people. Publish them only with the consent of
each one, under a licence that you choose (`license` above), and name somebody to whom people can write who want to be removed.

```python
import json

import numpy as np
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from lora_diffusion import LoRALayout, save_lora

row = next(iter(load_dataset("USER/NAME", split="train", streaming=True)))
layout = LoRALayout.from_dict(json.load(open(hf_hub_download("USER/NAME", "lora.json", repo_type="dataset")))["layout"])
save_lora(np.array(row["vector"], np.float32), layout, "one.safetensors")  # for ComfyUI, A1111, Forge and diffusers
```

`lora.json` says which layer each number of a vector belongs to, for which base model, and by which recipe (`{recipe_id}`).
"""


class HubDataset:
    """What of a corpus would be written. Raises ValueError if that is nobody.

    require_consent: only people of whom the corpus has consent.
    """

    def __init__(self, reader: CorpusReader, require_consent: bool = False) -> None:
        self.reader, self.require_consent = reader, require_consent
        self._stones = [name for name in reader.plan.identities if is_tombstone(name)]
        if not reader.shards:
            raise ValueError(f"nobody in the corpus at {reader.store.uri} has a LoRA")
        self.schema = pa.schema([reader.schema.field(name) for name in COLUMNS if name in reader.schema.names])
        vector = self.schema.field("vector").type
        self.row_bytes = vector.list_size * vector.value_type.bit_width // 8 + 2_500
        light = [name for name in ("identity", "consent") if name in self.schema.names]
        self.people = sum(map(len, self._tables(light)))
        if not self.people:
            what = "consent in the corpus" if require_consent else "a LoRA"
            raise ValueError(f"nobody in {reader.store.uri} has {what}: there is nothing to write")

    def tables(self) -> Iterator[pa.Table]:
        """Those of each shard who are to be written, by `schema`."""
        for table in self._tables(self.schema.names):
            yield table.select(self.schema.names).cast(self.schema)

    def made_with(self) -> dict[str, Any]:
        """The vectors' layout, the recipe and the base model: what `lora.json` says."""
        manifest = self.reader.manifest
        made_with = {"layout": manifest.layout, "recipe_id": manifest.recipe_id, "recipe": manifest.recipe}
        return {**made_with, **manifest.identity.metadata()}

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        for table in self.reader.tables(columns):
            names = table["identity"].to_pylist()
            allowed = set(not_forgotten(self.reader.store, self._stones, names))
            keep = pa.array([name in allowed for name in names], pa.bool_())
            if self.require_consent:
                if "consent" not in table.column_names:
                    return
                keep = pc.and_(keep, pc.is_valid(table["consent"].combine_chunks()))
            yield table.filter(keep).replace_schema_metadata(None)

    def write(self, store: Store) -> int:
        """Write all; files of an earlier export go. Returns the bytes of the Parquet files."""
        group = max(1, min(ROWS_OF_A_GROUP, 100_000_000 // self.row_bytes))
        rows = max(group, FILE_BYTES // self.row_bytes // group * group)
        count, sizes = -(-self.people // rows), {}
        for index, part in enumerate(self._files(rows)):
            sink = io.BytesIO()
            with pq.ParquetWriter(
                sink, self.schema, compression="zstd", use_dictionary=False, write_page_index=True
            ) as file:
                for start in range(0, len(part), group):
                    file.write_table(part.slice(start, group), row_group_size=group)
            name = f"train-{index:05d}-of-{count:05d}.parquet"
            store.write(f"data/{name}", sink.getvalue())
            sizes[name] = sink.tell()
        for name in store.files("data"):
            if _OURS.fullmatch(name) and name not in sizes:  # whoever left the corpus leaves the dataset
                store.delete(f"data/{name}")
        store.write_json("lora.json", self.made_with())
        keep_or_write(store, self.card(sum(sizes.values())))
        return sum(sizes.values())

    def _files(self, rows: int) -> Iterator[pa.Table]:
        """Tables of `rows` people; the last has the rest."""
        waiting = self.schema.empty_table()
        for table in self.tables():
            waiting = pa.concat_tables([waiting, table])
            while len(waiting) >= rows:
                yield waiting.slice(0, rows)
                waiting = waiting.slice(rows)
        if len(waiting):
            yield waiting

    def card(self, num_bytes: int) -> str:
        manifest = self.reader.manifest
        bounds = [(10**k, f"{_short(10 ** (k - 1))}<n<{_short(10**k)}") for k in range(4, 10)]
        size = "n<1K" if self.people < 1000 else next(name for bound, name in bounds if self.people < bound)
        split = {"name": "train", "num_bytes": self.people * self.row_bytes, "num_examples": self.people}
        header: dict[str, Any] = {
            "pretty_name": f"LoRAs of {self.people:,} people",
            "license": "other",
            "tags": ["lora", "stable-diffusion", "weight-space", "faces", "biometrics"],
            "size_categories": [size],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
            "dataset_info": {
                "features": [_feature(field) for field in self.schema],
                "splits": [split],
                "download_size": num_bytes,
                "dataset_size": split["num_bytes"],
            },
        }
        return _CARD.format(
            header=yaml.safe_dump(header, sort_keys=False),
            mark=MARK,
            people=self.people,
            base=manifest.identity.metadata().get("base_model", "?"),
            size=manifest.vector_size,
            recipe_id=manifest.recipe_id,
        )


def _feature(field: pa.Field) -> dict[str, Any]:
    if pa.types.is_fixed_size_list(field.type):
        return {"name": field.name, "list": _word(field.type.value_type), "length": field.type.list_size}
    return {"name": field.name, "dtype": _word(field.type)}


def _word(dtype: pa.DataType) -> str:
    """As `datasets` calls it."""
    return {"halffloat": "float16", "float": "float32"}.get(str(dtype), str(dtype))


def _short(count: int) -> str:
    return f"{count // 10**6}M" if count >= 10**6 else f"{count // 1000}K"
