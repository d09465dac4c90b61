"""Bytes that no program of ours wrote, for every reader of bytes from outside: mutations that know JSON, safetensors and tar.

Shared by `tests/test_hostile.py`, some hundred cases a reader, and `python -m tests.fuzz`, as many as one likes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save
from small_corpus import LAYOUT, NAMES, build

from lora_diffusion.config import CONFIGS, load_config
from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import open_people
from lora_diffusion.lora import formats
from lora_diffusion.models.kinds import shapes_of
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.publish import read_labels
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.dataset import read_rows
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot, take_snapshot
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.checkpoint import pack, unpack
from lora_diffusion.verify import examine


@dataclass(frozen=True)
class Reader:
    """`read(folder, data)` puts the bytes where a user would, and reads them. `seeds(folder)`: whole ones."""

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    prepare: Callable[[Path], object] = lambda folder: None
    change: str = "bytes"  # or json, safetensors: what the mutations know


# -- mutations ---------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53, 2**63, 10**40, -(2**63), 0.5, -0.0, 1e308, float("nan")),
    *("", "a", "../x", "/etc/passwd", "\0", "\ud800", "é" * 50, "F32", "[" * 2000, [], {}, [[]], {"": {}}, [0, 1]),
)


def mutate(random: Random, data: bytes, change: str) -> bytes:
    """One to four changes. A third of the cases are plain noise on the bytes, whatever `change` is."""
    for _ in range(random.randint(1, 4)):
        kind = change if random.random() < 0.67 else "bytes"
        data = {"bytes": _bytes, "json": _json, "safetensors": _safetensors}[kind](random, data)
    return data


def _bytes(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 64, 1000)))
    what = random.randrange(7)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[end:]
    if what == 2:
        return data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
    if what == 3:
        return data[:at] + random.randbytes(end - at) + data[end:]
    if what == 4:
        number = random.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
        return data[:at] + number.to_bytes(8, random.choice(("little", "big")))[: end - at] + data[end:]
    if what == 5 and end - at == 1:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[end:]
    return data[:at] + random.choice((b"[" * 3000, b'{"a":' * 900, b"0", b"-", b"9" * 30, b"\xff", b"\n")) + data[end:]


def _json(random: Random, data: bytes) -> bytes:
    try:
        return json.dumps(_tree(random, json.loads(data))).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return _bytes(random, data)


def _tree(random: Random, value: Any) -> Any:
    """The value with one node replaced, taken out, or put in twice."""
    if random.random() < 0.15 or not value or not isinstance(value, dict | list):
        return random.choice(VALUES)
    if isinstance(value, list):
        at = random.randrange(len(value))
        if random.random() < 0.3:
            return value[:at] + value[at + 1 :] if random.random() < 0.5 else [*value, value[at]]
        return [*value[:at], _tree(random, value[at]), *value[at + 1 :]]
    key, other = random.choice(list(value)), random.choice(list(value))
    what = random.random()
    if what < 0.15:
        return {name: inner for name, inner in value.items() if name != key}
    if what < 0.3:
        return {(other + "x" if name == key else name): inner for name, inner in value.items()}
    if what < 0.4:
        return {**value, key: value[other]}
    return {**value, key: _tree(random, value[key])}


def _safetensors(random: Random, data: bytes) -> bytes:
    """A changed header with its length set right; metadata that is JSON itself is changed inside."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        texts = [key for key, text in header["__metadata__"].items() if text[:1] in "{["]
        if texts and random.random() < 0.5:
            key = random.choice(texts)
            header["__metadata__"][key] = json.dumps(_tree(random, json.loads(header["__metadata__"][key])))
        else:
            header = _tree(random, header)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _bytes(random, data)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# -- readers -----------------------------------------------------------------------------------------------------------


def _put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.unlink(missing_ok=True)  # the one before may still be mapped
    path.write_bytes(data)
    return path


def _lora_seeds(folder: Path) -> list[bytes]:
    vector_N = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    ours = [formats.to_bytes(vector_N, LAYOUT, format) for format in ("kohya", "diffusers", "vector")]  # type: ignore[arg-type]
    tensors = {
        f"base_model.model.a.to_q.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 5)), ("B", (4, 2)))
    }
    return [*ours, save(tensors, {"format": "pt"})]


def _read_lora(folder: Path, data: bytes) -> None:
    formats.read(_put(folder, "x.safetensors", data), LAYOUT, partial=True, ignore_extra=True, svd=True)


def _read_peft(folder: Path, data: bytes) -> None:
    _put(folder, "adapter_config.json", data)
    formats.read(folder, LAYOUT)


def _peft(folder: Path) -> None:
    formats.save(torch.ones(LAYOUT.size), LAYOUT, folder, "peft")


def _corpus(folder: Path) -> None:
    build(open_store(folder), NAMES)


def _of_corpus(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        _put(folder, name, data)
        for look in (_vectors, CorpusReader.failures, CorpusReader.verify, CorpusReader.statistics, _trained_on):
            with suppress(ValueError):
                look(CorpusReader(folder))
        list(examine(str(folder)))

    change = "json" if name.endswith(".json") else "safetensors" if name.endswith(".safetensors") else "bytes"
    return Reader(lambda folder: [(folder / name).read_bytes()], read, _corpus, change)


def _vectors(reader: CorpusReader) -> None:
    reader.vectors()
    reader.sample(2, ["identity"])
    len(reader)


def _trained_on(reader: CorpusReader) -> None:
    snapshot = take_snapshot(reader.store.uri)
    for index in snapshot.shards:
        list(read_rows(snapshot, index))


def _scores(folder: Path) -> list[bytes]:
    array = np.ones((2, 1, 1, 2), np.float32)
    found, hits = np.ones((2, 1, 1), bool), np.ones((2, 1, 3), np.int8)
    return [Scores(np.arange(2), array, found, hits, array[:, 0, 0], np.zeros((0, 0, 0, 0, 3), np.uint8)).to_bytes()]


def _checkpoint(folder: Path) -> list[bytes]:
    return [pack({"a": torch.ones(3, 2), "b": torch.ones((), dtype=torch.int64), "c": torch.zeros(0, 4)}, {"step": 3})]


def _yaml_seeds(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))] + [
        b"a: &a0 [x, x]\nbase: &b [" + b", ".join(b"&a%d [*a%d, *a%d]" % (i + 1, i, i) for i in range(30)) + b"]\n",
        b"a: &a {b: *a}\nfinetune: *a\n", b"finetune: !!bool x\n", b"device: !!int ''\n", b"base: !!timestamp x\n", b"? [1]\n: 2\n",
    ]  # fmt: skip


def _read_yaml(folder: Path, data: bytes) -> None:
    path = _put(folder, "x.yaml", data)
    with suppress(ValueError):
        load_config(CorpusConfig, None, [f"finetune={data[:200].decode('utf-8', 'replace')}"])
    load_config((CorpusConfig, TrainConfig, ServeConfig)[len(data) % 3], path)


@cache
def _jpeg(seed: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **({"progressive": True} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _tar_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for mode, format in (("w", tarfile.PAX_FORMAT), ("w", tarfile.GNU_FORMAT), ("w:gz", tarfile.GNU_FORMAT)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=format) as tar:  # type: ignore[call-overload]
            for name in ("ada/1.jpg", "ada/1.txt", f"bo/{'é' * 120}.jpg"):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(_jpeg()), 0.5
                tar.addfile(member, io.BytesIO(_jpeg()))
            link = tarfile.TarInfo("cy/1.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../ada/1.jpg"
            tar.addfile(link)
        seeds.append(buffer.getvalue())
    return seeds


def _people(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        source = open_people(str(_put(folder, name, data)))
        for person in source.list_people():
            source.photos(person, 3)

    return read


def _people_table() -> pa.Table:
    return pa.table(
        {"identity": ["ada", "ada", "bo"], "image": [_jpeg(0), _jpeg(1), _jpeg(2)], "caption": ["x", None, "z"]}
    )


def _people_parquet(folder: Path) -> list[bytes]:
    seeds, table = [], _people_table()
    lists = pa.table(
        {"identity": ["ada", None], "image": [[{"bytes": _jpeg(), "path": None}], []], "caption": [["x"], None]}
    )
    for each, options in ((table, {}), (table, {"compression": "none", "use_dictionary": False}), (lists, {})):
        sink = pa.BufferOutputStream()
        pq.write_table(each, sink, **options)
        seeds.append(sink.getvalue().to_pybytes())
    return seeds


def _people_arrow(folder: Path) -> list[bytes]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _people_table().schema) as stream:
        stream.write_table(_people_table())
    return [sink.getvalue().to_pybytes()]


def _captions(folder: Path) -> list[bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"file": ["ada/1.jpg"], "caption": ["x"]}), sink)
    return [sink.getvalue().to_pybytes()]


def _folder_of_people(folder: Path) -> None:
    (folder / "ada").mkdir(exist_ok=True)
    _put(folder, "ada/1.jpg", _jpeg())


def _read_captions(folder: Path, data: bytes) -> None:
    _put(folder, "faces.parquet", data)
    source = open_people(str(folder))
    for person in source.list_people():
        source.photos(person, 3)


def _labels(folder: Path) -> list[bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"identity": ["ada", "bo"], "beard": [0.0, None]}), sink)
    return [sink.getvalue().to_pybytes()]


def _synthesizer(folder: Path) -> None:
    from synthesis_world import untrained

    untrained("pca").save_pretrained(folder)
    Synthesizer.from_pretrained(folder)  # what it imports takes seconds


def _of_synthesizer(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        _put(folder, name, data)
        Synthesizer.from_pretrained(folder)

    change = "json" if name == "config.json" else "safetensors"
    return Reader(lambda folder: [_unsealed((folder / name).read_bytes(), change)], read, _synthesizer, change)


def _unsealed(data: bytes, change: str) -> bytes:
    """As an earlier release wrote it: with a checksum, nearly no mutation would reach what reads the content."""
    from safetensors.torch import load

    if change == "safetensors":
        return save(load(data), {"format": "pt"})
    return json.dumps({k: v for k, v in json.loads(data).items() if k not in ("checksum", "sha256")}).encode()


def _snapshot(folder: Path) -> list[bytes]:
    _corpus(folder / "corpus")
    return [json.dumps(take_snapshot(str(folder / "corpus")).to_dict()).encode()]


def _read_snapshot(folder: Path, data: bytes) -> None:
    snapshot = CorpusSnapshot.from_dict(open_store(_put(folder, "data.json", data).parent).read_json("data.json"))
    _ = snapshot.key, snapshot.identity, snapshot.num_rows


READERS = {
    "lora": Reader(_lora_seeds, _read_lora, change="safetensors"),
    "peft_config": Reader(lambda folder: [(folder / "adapter_config.json").read_bytes()], _read_peft, _peft, "json"),
    "shard": _of_corpus("shards/00001.parquet"),
    "failures": _of_corpus("failures/00001.parquet"),
    "plan": _of_corpus("plan/00000.parquet"),
    "manifest": _of_corpus("corpus.json"),
    "shard_statistics": _of_corpus("statistics/00000.safetensors"),
    "statistics": Reader(
        lambda folder: [Statistics.of(np.ones((2, 3))).to_bytes()],
        lambda _, data: Statistics.from_bytes(data),
        change="safetensors",
    ),
    "checkpoint": Reader(
        _checkpoint,
        lambda folder, data: unpack(open_store(_put(folder, "x.safetensors", data).parent), "x.safetensors"),
        change="safetensors",
    ),
    "scores": Reader(_scores, lambda _, data: Scores.from_bytes(data), change="safetensors"),
    "snapshot": Reader(_snapshot, _read_snapshot, change="json"),
    "yaml": Reader(_yaml_seeds, _read_yaml),
    "tar": Reader(_tar_seeds, _people("x.tar")),
    "people_parquet": Reader(_people_parquet, _people("x.parquet")),
    "people_arrow": Reader(_people_arrow, _people("x.arrow")),
    "captions": Reader(_captions, _read_captions, _folder_of_people),
    "labels": Reader(_labels, lambda folder, data: read_labels(str(_put(folder, "x.parquet", data)))),
    "synthesizer_config": _of_synthesizer("config.json"),
    "synthesizer_codes": _of_synthesizer("codes.safetensors"),
    "synthesizer_denoiser": _of_synthesizer("denoiser.safetensors"),
    "model_file": Reader(
        _lora_seeds, lambda folder, data: shapes_of(_put(folder, "x.safetensors", data)), change="safetensors"
    ),
    "photo": Reader(
        lambda folder: [_jpeg(0, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")],
        lambda _, data: load_photo(data),
    ),
}
