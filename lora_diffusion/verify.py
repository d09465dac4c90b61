"""Whether a corpus, a training run or a synthesiser is whole: every byte of every file, and whether they belong together.

What a job makes again when it is gone can be removed (`Finding.remove`); what is not ours is named and left alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.artifacts import checksum
from lora_diffusion.artifacts.identity import SHIPPED_SYNTHESIZERS
from lora_diffusion.corpus import CorpusReader, ShardPlan, Statistics
from lora_diffusion.corpus.forget import follow_tombstones
from lora_diffusion.corpus.plan import file_index, shard_name
from lora_diffusion.corpus.reader import NO_STATISTICS
from lora_diffusion.corpus.schema import check_columns, parquet_metadata
from lora_diffusion.corpus.tombstone import KEY_FILE, is_tombstone, make_key, read_key, tombstone
from lora_diffusion.storage import Store, StoreError, open_store

AT_ONCE = 4  # files in memory
CLAIM, CLAIMS = "claim.json", r"claim(-[0-9a-f]{16})?\.json"  # of a job that is at work, and of one that takes over
_CORPUS = re.compile(
    rf"corpus\.json|{CLAIMS}|statistics\.safetensors|README\.md|summary\.txt|contact_sheet\.png|identity\.key|(plan|shards|failures|statistics)/"
)
_RUN = re.compile(
    rf"data\.json|config\.yaml|{CLAIMS}|statistics\.safetensors|pca\.safetensors|explained_variance\.(json|png)"
    r"|linear_guess\.safetensors|metrics\.jsonl|results\.json|checkpoints/[a-z]+(-best)?\.safetensors|plots/\w+\.png"
    r"|(checkpoints|plots|tensorboard|ray|synthesizer|before_pictures)/"
)
_SYNTHESIZER = re.compile(r"config\.json|(codes|denoiser|edits|neighbours)\.safetensors|README\.md")


@dataclass(frozen=True)
class Finding:
    """`name`: of a file below the place. `remove`: files whose job makes them again, this one among them, once they are gone."""

    kind: Literal["damaged", "missing", "other recipe", "foreign", "forgotten"]
    name: str
    what: str
    remove: tuple[str, ...] = ()


def examine(uri: str) -> Iterator[Finding]:
    """What is wrong at `uri`, found while it is read. Raises ValueError if nothing of ours lies there, StoreError if the place
    cannot be read."""
    store = open_store(SHIPPED_SYNTHESIZERS.get(uri, uri))
    files, folders = store.files_and_folders()
    if "corpus.json" in files or {"plan", "shards"} <= set(folders):
        return _corpus(store)
    if "config.json" in files:
        return _synthesizer(store)
    if {"data.json", "config.yaml"} & set(files):
        return _run(store)
    raise ValueError(f"{store.uri} holds no corpus, training run or synthesiser: expected one of these folders")


def repair(uri: str, findings: Iterable[Finding]) -> list[str]:
    """Remove what is made again, and who was forgotten; returns the names of files that are gone.

    Raises ValueError while a job is at work there.
    """
    store = open_store(SHIPPED_SYNTHESIZERS.get(uri, uri))
    findings = list(findings)
    names = list(dict.fromkeys(name for finding in findings for name in finding.remove))
    forgotten = any(finding.kind == "forgotten" for finding in findings)
    if (names or forgotten) and store.exists(CLAIM):
        raise ValueError(f"a job is at work at {store.uri}: let it end first. If none runs, delete {CLAIM} there")
    for name in names:
        store.delete(name)
    if forgotten:
        follow_tombstones(store)
    return names


# -- a corpus ----------------------------------------------------------------------------------------------------------


def _corpus(store: Store) -> Iterator[Finding]:
    yield from _foreign(store, "", _CORPUS.fullmatch)
    try:
        reader = CorpusReader(store)
        written = store.read_json("corpus.json")
        checksum.check_json(written)
        if written["recipe_id"] != reader.manifest.recipe_id:
            raise ValueError(f"it says recipe {written['recipe_id']}, but holds that of {reader.manifest.recipe_id}")
    except (ValueError, KeyError) as error:
        yield Finding("damaged", "corpus.json", f"{_reason(error)}. Restore it from a copy")
        return
    plan_files = sorted(store.files("plan"))
    parts = [_try(f"plan/{name}", partial(_table, store)) for name in plan_files if file_index(name) is not None]
    yield from (
        replace(part, what=f"{part.what}. Restore it from a copy") for part in parts if isinstance(part, Finding)
    )
    if any(isinstance(part, Finding) for part in parts):
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # of strangers, who are named below
            shards, problems = reader.plan.shards, reader.verify()[1]
    except ValueError as error:
        yield Finding("missing", "plan", _reason(error))
        return
    yield from _planned_again(reader)
    ours = {f"plan/{shard_name(index)}.parquet" for index in range(len(parts))}
    for shard in shards:
        ours |= {f"{folder}/{shard.name}.parquet" for folder in ("shards", "failures")}
        ours.add(f"statistics/{shard.name}.safetensors")
    for folder in ("plan", "shards", "failures", "statistics"):
        yield from _foreign(store, folder, ours.__contains__)
    there = {f"{folder}/{name}" for folder in ("shards", "failures", "statistics") for name in store.files(folder)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(lambda shard: list(_shard(reader, shard, there, problems.get(shard.index, ""))), shards):
            yield from found
    if reader.manifest.state == "complete":
        total = _try("statistics.safetensors", partial(_statistics, store))
        if isinstance(total, Finding):
            yield replace(total, remove=("statistics.safetensors",) if total.kind == "damaged" else ())
        elif total.count != reader.manifest.counts.get("num_people"):
            yield Finding(
                "damaged", "statistics.safetensors", f"it counts {total.count} people", ("statistics.safetensors",)
            )


def _planned_again(reader: CorpusReader) -> Iterator[Finding]:
    """The key of who was forgotten, and whom it names all the same."""
    stones = {name for name in reader.plan.identities if is_tombstone(name)}
    key = _try(KEY_FILE, lambda _: make_key(reader.store, stones) if stones else read_key(reader.store))
    if isinstance(key, Finding):
        yield replace(key, kind="damaged" if reader.store.exists(KEY_FILE) else "missing")
    for part, names in enumerate(reader.plan.parts if stones and isinstance(key, bytes) else ()):
        for name in names:
            if tombstone(key, name) in stones:
                again = "run `lora-diffusion forget` with this name once more"
                yield Finding(
                    "forgotten", f"plan/{shard_name(part)}.parquet", f"it names {name!r}, who was forgotten: {again}"
                )


def _come_back(shard: ShardPlan, name: str, rows: pa.Table) -> Iterator[Finding]:
    """Who lies, or failed, where the plan has a tombstone: `forget` was killed, or a backup was put back."""
    planned = dict(zip(shard.positions, shard.identities, strict=True))
    pairs = zip(rows["position"].to_pylist(), rows["identity"].to_pylist(), strict=True)
    back = {who for place, who in pairs if is_tombstone(planned.get(place, "")) and not is_tombstone(str(who))}
    if back:
        said = "--repair takes them out, and so does the job's next run"
        yield Finding(
            "forgotten", name, f"it still holds {', '.join(map(repr, sorted(back)))}, who were forgotten: {said}"
        )


def _shard(reader: CorpusReader, shard: ShardPlan, there: set[str], problem: str) -> Iterator[Finding]:
    """One that is not committed is missing only from a corpus that says it is complete."""
    name, failures = f"shards/{shard.name}.parquet", f"failures/{shard.name}.parquet"
    statistics = f"statistics/{shard.name}.safetensors"
    if name not in there:
        if reader.manifest.state == "complete":
            yield Finding("missing", name, f"its {len(shard.identities)} people are in no shard")
        return
    rows = _try(name, partial(_table, reader.store))
    if isinstance(rows, Finding):
        yield replace(rows, remove=(name,))
        return
    try:
        recipe_id = parquet_metadata(rows.schema).get("recipe_id")
    except ValueError as error:
        yield Finding("damaged", name, str(error), (name,))
        return
    if recipe_id != reader.manifest.recipe_id:
        yield Finding(
            "other recipe",
            name,
            f"it was made with recipe {recipe_id}, the corpus has {reader.manifest.recipe_id}",
            (name,),
        )
        return
    reasons = _try(failures, partial(_table, reader.store)) if failures in there else None
    back = list(_come_back(shard, name, rows))
    if isinstance(reasons, pa.Table):
        back += _come_back(shard, failures, reasons)
    yield from back
    if isinstance(reasons, Finding):
        yield replace(reasons, remove=(name,))  # a shard is made together with its failures
    elif back:
        return
    elif problem and problem != NO_STATISTICS:
        yield Finding("damaged", name, problem, (name,))
    part = _try(statistics, partial(_statistics, reader.store))
    if isinstance(part, Finding):
        yield replace(part, remove=(statistics,) if part.kind == "damaged" else ())
    elif (part.count, len(part.mean)) != (len(rows), reader.layout.size):
        yield Finding("damaged", statistics, f"it is of {part.count} people, the shard of {len(rows)}", (statistics,))


def _table(store: Store, name: str) -> pa.Table:
    data = store.read(name)
    checksum.check_parquet(data)
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    table = file.read()
    if len(table) != file.metadata.num_rows:
        raise ValueError(f"it has {len(table)} rows of {file.metadata.num_rows}")
    return check_columns(table)


def _statistics(store: Store, name: str) -> Statistics:
    return Statistics.from_bytes(store.read(name))


# -- a training run ----------------------------------------------------------------------------------------------------


def _run(store: Store) -> Iterator[Finding]:
    from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot
    from lora_diffusion.synthesis.training.train_config import BEFORE_PICTURES, SYNTHESIZER

    for folder in ("", "checkpoints", "plots"):
        yield from _foreign(store, folder, _RUN.fullmatch)
    files, folders = store.files_and_folders()
    snapshot = None
    if "data.json" in files:
        snapshot = _try("data.json", lambda name: CorpusSnapshot.from_dict(_checked(store.read_json(name))))
        if isinstance(snapshot, Finding):
            yield replace(snapshot, what=f"{snapshot.what}. Restore it from a copy, or begin another run")
            snapshot = None
    if "statistics.safetensors" in files:
        found = _try("statistics.safetensors", partial(_statistics, store))
        if isinstance(found, Finding):
            yield replace(found, remove=(found.name,))
        elif snapshot is not None and len(found.mean) != snapshot.vector_size:
            yield Finding(
                "other recipe", "statistics.safetensors", "it is of another layout", ("statistics.safetensors",)
            )
    kept: list[str] = [name for name in ("pca.safetensors", "linear_guess.safetensors") if name in files]
    kept += [
        f"checkpoints/{name}" for name in sorted(store.files("checkpoints")) if _RUN.fullmatch(f"checkpoints/{name}")
    ]
    for name in kept:
        remove = tuple(
            dict.fromkeys((name, name.replace("-best.", ".")))
        )  # trained on without its best, it would not end
        meta = _try(name, partial(_saved_meta, store))
        if isinstance(meta, Finding):
            yield replace(meta, remove=remove)
        elif snapshot is not None and (rows := _rows_key(meta)) not in (None, snapshot.key):
            yield Finding("other recipe", name, f"it learned from rows {rows}, the run from {snapshot.key}", remove)
    for folder in (SYNTHESIZER, BEFORE_PICTURES):
        if folder in folders:
            for finding in _synthesizer(open_store(f"{store.uri}/{folder}")):
                name = f"{folder}/{finding.name}"
                yield replace(finding, name=name, remove=(name,) if finding.kind == "damaged" else ())


def _saved_meta(store: Store, name: str) -> dict[str, Any]:
    from lora_diffusion.training.checkpoint import SavedTensors

    saved = SavedTensors(store, name)
    for _ in saved:  # to the checksum at the end
        pass
    return saved.meta


def _rows_key(meta: dict[str, Any]) -> str | None:
    return meta.get("data", meta.get("identity", {}).get("data", {})).get("rows")


# -- a synthesiser -----------------------------------------------------------------------------------------------------


def _synthesizer(store: Store) -> Iterator[Finding]:
    from lora_diffusion.synthesis.folder import read_folder

    yield from _foreign(store, "", _SYNTHESIZER.fullmatch)
    config = _try("config.json", lambda name: _checked(store.read_json(name)))
    if isinstance(config, Finding):
        yield config
        return
    whole = True
    for name in [f"{name}.safetensors" for name in config.get("files", ())]:
        found = _try(name, partial(_sealed, store))
        if isinstance(found, Finding):
            whole = False
            yield found
    if whole:
        fits = _try("config.json", lambda _: read_folder(store.uri))
        if isinstance(fits, Finding):
            yield fits


def _sealed(store: Store, name: str) -> None:
    from safetensors.torch import load

    data = store.read(name)
    checksum.check(data)
    load(data)


def _checked(values: Any) -> dict[str, Any]:
    checksum.check_json(values)
    return dict(values)


# -- all ---------------------------------------------------------------------------------------------------------------


def _foreign(store: Store, folder: str, ours: Callable[[str], object]) -> Iterator[Finding]:
    """`ours`: of a path below the place, that of a folder with / at its end."""
    files, folders = store.files_and_folders(folder)
    for name in sorted([*files, *(f"{name}/" for name in folders)]):
        path = f"{folder}/{name}" if folder else name
        if not ours(path):
            yield Finding("foreign", path, "not ours; left alone")


def _try(name: str, read: Callable[[str], Any]) -> Any:
    """What `read` makes of the file; a Finding if it is damaged or gone."""
    try:
        return read(name)
    except FileNotFoundError as error:
        return Finding("missing", name, _reason(error))
    except StoreError:
        raise
    except Exception as error:  # damaged bytes meet the parsers with many kinds of error
        return Finding("damaged", name, _reason(error))


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
