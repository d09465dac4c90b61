"""A corpus -> the files that weights2weights' code reads, a dataset folder for the Hugging Face Hub, or a Lance table.

    lora-diffusion export runs/sd15/corpus output=files
    lora-diffusion export s3://bucket/corpus output=files rescale=true dtype=float16
    lora-diffusion export s3://bucket/corpus output=dataset format=hf require_consent=true
    lora-diffusion export s3://bucket/corpus output=s3://bucket/corpus.lance format=lance

format=weights2weights: all_weights.pt, mean.pt, std.pt, identity_df.csv, and embeddings.npy; the disk needs the matrix twice for a
moment. The other way: lora-diffusion import-weights2weights. format=hf: data/*.parquet, README.md (the card) and lora.json, which
`datasets.load_dataset` and the Hub's viewer read. format=lance: a table that finds rows by number and people by their face. Rows of
both are written as they are read, so memory does not grow with the corpus.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch

from lora_diffusion.corpus import CorpusReader, Statistics, matrix
from lora_diffusion.corpus.hub import HubDataset
from lora_diffusion.corpus.lance import write_lance
from lora_diffusion.factory import weights2weights
from lora_diffusion.lora.weights2weights import to_weights2weights
from lora_diffusion.places import Output, Place, local_place
from lora_diffusion.storage import open_store
from lora_diffusion.training.meter import in_bytes


@dataclass(frozen=True)
class Config:
    """corpus: for weights2weights of rank 1 on `to_q` and `to_v` of Stable Diffusion 1.5. output: a folder; of hf and lance also s3://.

    format: weights2weights' own files, a dataset folder for the Hugging Face Hub (hf), or a Lance table.
    dtype, rescale: of weights2weights. rescale: of a corpus whose alpha is not 27, fold the difference into B.
    require_consent: only people of whom the corpus has consent.
    """

    corpus: Place
    output: Output
    format: Literal["weights2weights", "hf", "lance"] = "weights2weights"
    dtype: Literal["float32", "float16"] = "float32"
    rescale: bool = False
    require_consent: bool = False


def dry_run(config: Config) -> str:
    if config.format != "weights2weights":
        dataset = HubDataset(CorpusReader(config.corpus), config.require_consent)
        return f"{dataset.people:,} people of {config.corpus}, about {in_bytes(dataset.people * dataset.row_bytes)} -> {config.output}"
    dataset, _ = checked(config)
    size = dataset.people * dataset.reader.layout.size * np.dtype(config.dtype).itemsize
    return f"{dataset.people:,} rows of {config.corpus}, {in_bytes(size)} -> {config.output}"


def run(config: Config, ray_address: str) -> None:
    if config.format != "weights2weights":
        store, dataset = open_store(config.output), HubDataset(CorpusReader(config.corpus), config.require_consent)
        if config.format == "hf":
            dataset.write(store)
        else:
            write_lance(dataset, store)
        print(
            f"{dataset.people:,} people, {in_bytes(dataset.people * dataset.row_bytes)} without compression: {store.uri}"
        )
        return
    dataset, folder = checked(config)
    folder.mkdir(parents=True, exist_ok=True)
    layout = dataset.reader.layout
    dtype, count, raw = (
        getattr(torch, config.dtype),
        dataset.people,
        folder / f".all_weights.{secrets.token_hex(6)}.tmp",
    )
    statistics = Statistics.empty(layout.size)  # of whom is written, as the corpus has them
    names: list[str] = []
    embeddings = []
    try:
        rows_MN = torch.from_file(str(raw), shared=True, size=count * layout.size, dtype=dtype).view(count, -1)
        for table in dataset.tables():
            if not len(table):
                continue
            vectors_PN = matrix(table["vector"])
            statistics = statistics.merge(Statistics.of(vectors_PN))
            for row, vector_N in enumerate(vectors_PN, len(names)):
                rows_MN[row] = to_weights2weights(vector_N, layout, rescale=config.rescale).to(dtype)
            names += table["identity"].to_pylist()
            embeddings.append(matrix(table["embedding"]))
        if len(names) != count:
            raise ValueError(f"{config.corpus} was changed while it was read: give the same command again")
        for name in ("identity_df.csv", "mean.pt", "std.pt", "embeddings.npy"):
            (folder / name).unlink(missing_ok=True)  # of an earlier export: other people's names
        save(rows_MN, folder / "all_weights.pt")
    finally:
        raw.unlink(missing_ok=True)
    for name in ("mean", "std"):
        values_N = torch.from_numpy(getattr(statistics, name)).float()
        save(to_weights2weights(values_N, layout, rescale=config.rescale), folder / f"{name}.pt")
    np.save(folder / "embeddings.npy", np.concatenate(embeddings))
    pa.csv.write_csv(pa.table({"identity": names}), folder / "identity_df.csv")
    print(f"{count:,} rows of {layout.size:,} {config.dtype}: {folder}/all_weights.pt")


def checked(config: Config) -> tuple[HubDataset, Path]:
    """Raises ValueError for LoRAs that their code has no place for."""
    reader, theirs = CorpusReader(config.corpus), weights2weights.layout()
    if (reader.layout.entries, reader.layout.rank) != (theirs.entries, theirs.rank):
        raise ValueError(
            f"the corpus at {reader.store.uri} has N = {reader.layout.size:,}, rank {reader.layout.rank}; weights2weights' code takes "
            f"{theirs.size:,} numbers: rank 1 on to_q and to_v of Stable Diffusion 1.5 (configs/sd15.yaml)"
        )
    to_weights2weights(torch.zeros(theirs.size), reader.layout, rescale=config.rescale)
    return HubDataset(reader, config.require_consent), local_place(config.output, "output")


def save(tensor: torch.Tensor, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    torch.save(tensor, temporary)
    os.replace(temporary, path)
