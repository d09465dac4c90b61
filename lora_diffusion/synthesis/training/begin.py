"""Before a training begins: which rows, whether this run may use them, and what it will cost."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from lora_diffusion.artifacts import checksum
from lora_diffusion.artifacts.identity import Identity, read_identity
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.corpus.tombstone import read_key
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.factory.people import open_people
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.denoiser import count_parameters
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.training.dataset import RowCache
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot, check_snapshot, take_snapshot
from lora_diffusion.synthesis.training.train_config import CONDITION_SIZE, SYNTHESIZER, TrainConfig
from lora_diffusion.synthesis.vae import LoRAVAE
from lora_diffusion.training.meter import in_bytes

DATA = "data.json"
# float32: weights, gradients, AdamW's two moments, moving average
BYTES_PER_PARAMETER = 20
BYTES_AT_THE_END = 8  # the best weights, and a layer on its way to the store: the largest hold nearly half of a VAE
PROCESS_BYTES = 1e9  # torch, Ray, the batch


def snapshot_of(config: TrainConfig) -> CorpusSnapshot | None:
    """The rows that this run began with, or those that are in the corpus now; None where pictures alone teach: no corpus is
    needed. Writes nothing.

    Raises ValueError if the corpus does not fit the run or the configuration, or is not what it was.
    """
    check_workers(config)
    check_pictures(config)
    if not config.needs_corpus:
        return None
    store = open_store(config.output)
    try:
        snapshot = CorpusSnapshot.from_dict(store.read_json(DATA))
    except FileNotFoundError:
        snapshot = take_snapshot(config.corpus)
    else:
        identity = _check_same_corpus(config, snapshot, store)
        snapshot = replace(snapshot, recogniser=asdict(identity.recogniser), start=identity.start)
        check_snapshot(snapshot)
    if config.layout_id is not None and snapshot.layout_id != config.layout_id:
        raise ValueError(
            f"the corpus at {config.corpus} has layout_id {snapshot.layout_id}, the configuration asks for "
            f"{config.layout_id}: its vectors mean something else. Give another corpus, or layout_id={snapshot.layout_id}"
        )
    return _with_recogniser(config, snapshot)


def _with_recogniser(config: TrainConfig, snapshot: CorpusSnapshot) -> CorpusSnapshot:
    """The recogniser called as the configuration calls it. Raises ValueError if it is not the corpus'."""
    if config.recogniser is None or config.recogniser == snapshot.recogniser.get("name"):
        return snapshot
    embedder = FaceEmbedder(EmbedderConfig(model=config.recogniser))
    snapshot.identity.check_recogniser(embedder, f"the corpus at {snapshot.uri}")
    return replace(snapshot, recogniser={"name": config.recogniser, "fingerprint": embedder.fingerprint})


def begin(config: TrainConfig) -> CorpusSnapshot | None:
    """As `snapshot_of`, and writes down what this run is."""
    snapshot = snapshot_of(config)
    if snapshot is not None and config.keep_neighbours:
        read_key(open_store(config.corpus))  # damaged, it would end the run in the last minute
    store = open_store(config.output)
    if snapshot is not None and not store.exists(DATA):
        store.write_json(DATA, checksum.seal_json(snapshot.to_dict()))
    return snapshot


def _check_same_corpus(config: TrainConfig, snapshot: CorpusSnapshot, store: Store) -> Identity:
    """The corpus' identity: a run of an earlier release noted only a part of it."""
    if snapshot.uri != config.corpus:
        raise ValueError(
            f"{store.uri} was begun with the corpus at {snapshot.uri}, not {config.corpus}: choose another output"
        )
    now = CorpusReader(config.corpus).manifest
    if (now.layout_id, now.recipe_id) != (snapshot.layout_id, snapshot.recipe_id):
        raise ValueError(
            f"the corpus at {config.corpus} was made anew since {store.uri} was begun: it has layout_id {now.layout_id} "
            f"and recipe {now.recipe_id}, the run {snapshot.layout_id} and {snapshot.recipe_id}. Choose another output"
        )
    return now.identity


def check_workers(config: TrainConfig) -> None:
    """Raises ValueError for batches that the workers could not share."""
    most = config.workers.max_workers or config.workers.num_workers
    for name in ("vae_training", "denoiser_training", "pictures_training"):
        size = getattr(config, name).batch_size
        if size < most:
            raise ValueError(f"{name}.batch_size is {size}, for up to {most} workers: give each at least one row")


def check_pictures(config: TrainConfig) -> None:
    """Raises ValueError where the stage `pictures` would find nobody, or no synthesiser to start from."""
    if "pictures" not in config.stages:
        return
    if not config.pictures.people:
        raise ValueError("stage=pictures needs pictures.people: a folder, Parquet files or tars with photos of people")
    open_people(config.pictures.people)
    if config.pictures.start or "denoiser" not in config.stages:
        read_identity(config.before_pictures)


def describe(config: TrainConfig, snapshot: CorpusSnapshot | None) -> str:
    """What a run would do: rows, layout, parameters, memory, steps. Reads the corpus' statistics, no vectors or photos."""
    lines = [] if snapshot is None else _corpus_lines(config, snapshot)
    c, p = config, config.pictures
    if "pictures" in c.stages:
        t, drawn = c.pictures_training, c.pictures_training.batch_size * p.pictures_each
        lines.append(
            f"pictures: people of {p.people}, from {c.before_pictures}; {t.steps:,} steps of "
            f"{t.batch_size} people × {p.pictures_each} pictures × {p.num_inference_steps} sampling steps, {p.gradient_steps} of "
            f"them with gradient: about {drawn * (p.num_inference_steps + 3 * p.gradient_steps):,} passes of the base model a step"
        )
    workers = f"{c.workers.num_workers}" + (f" to {c.workers.max_workers}" if c.workers.max_workers else "")
    device = "GPU" if c.workers.use_gpu else f"{c.workers.cpus} CPU"
    lines.append(f"workers: {workers}, each with {device}, {c.workers.parallel}")
    return "\n".join([*lines, f"output: {c.output}, the synthesiser in its {SYNTHESIZER}/"])


def _corpus_lines(config: TrainConfig, snapshot: CorpusSnapshot) -> list[str]:
    rows, c = snapshot.num_rows, config
    if c.data.max_people is not None:
        rows = min(rows, c.data.max_people)
    held = round(rows * c.data.validation_fraction)
    statistics = CorpusReader(snapshot.uri).statistics()
    varying = Normaliser.from_statistics(statistics).size if np.isfinite(statistics.M2).all() else snapshot.vector_size
    cache = RowCache(snapshot, c.data.cache)
    lines = [
        f"corpus: {snapshot.num_rows:,} people with a LoRA in {len(snapshot.shards):,} shards of {snapshot.uri}, "
        f"{snapshot.num_failed:,} failed",
        f"base model: {snapshot.identity.base}, recogniser: {snapshot.identity.recogniser}",
        f"layout: {snapshot.layout_id}, N = {snapshot.vector_size:,} parameters, {varying:,} of them vary",
        f"rows: about {rows - held:,} for training, {held:,} for validation",
        f"cache: {in_bytes(cache.num_bytes)} in {cache.folder} on each machine"
        + (" (filled already)" if cache.complete else ""),
    ]
    if "pca" in c.stages:
        exact = rows - held <= c.pca.exact_rows
        floats = (rows - held) * varying if exact else 3 * varying * (c.pca.num_components + 32)
        kind = "exact" if exact else f"randomised, {c.pca.iterations} passes"
        lines.append(f"pca: {kind}, up to {c.pca.num_components} components, about {in_bytes(floats * 4)}")
    sizes = {"latent": c.vae.latent_size, "pca": min(c.pca.num_components, rows - held), "vector": varying}
    counts = {"vae": _vae_parameters(config, snapshot.vector_size, varying)} if "vae" in c.stages else {}
    if "denoiser" in c.stages:
        counts["denoiser"] = count_parameters(c.denoiser, sizes[c.code_space], CONDITION_SIZE)
    return lines + [_stage_line(config, name, count, rows - held) for name, count in counts.items()]


def _stage_line(config: TrainConfig, name: str, parameters: int, rows: int) -> str:
    training = getattr(config, f"{name}_training")
    epochs = training.steps * min(training.batch_size, rows) / max(1, rows)
    return (
        f"{name}: {parameters:,} parameters, about {in_bytes(memory(config, parameters))} in each worker; "
        f"{training.steps:,} steps of {training.batch_size} ({epochs:,.0f} epochs)"
        + (f", less if {training.patience} validations bring nothing" if training.patience else "")
    )


def memory(config: TrainConfig, parameters: int) -> float:
    """Bytes that a worker takes at most while it trains so many parameters: when a checkpoint or the end is written."""
    workers = config.workers
    split = workers.num_workers if workers.parallel == "fsdp" else 1
    buckets = 4 * parameters if workers.parallel == "ddp" and (workers.max_workers or workers.num_workers) > 1 else 0
    return PROCESS_BYTES + parameters * BYTES_PER_PARAMETER / split + buckets + parameters * BYTES_AT_THE_END


def _vae_parameters(config: TrainConfig, size: int, varying: int) -> int:
    std = torch.zeros(size)
    std[:varying] = 1.0
    normaliser: Any = Normaliser(torch.zeros(size), std)
    with torch.device("meta"):
        return sum(p.numel() for p in LoRAVAE(config.vae, normaliser).parameters())
