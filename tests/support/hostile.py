"""Every reader of bytes from outside, with good files to begin from; `mutations.py` makes hostile ones of them.

Shared by `tests/test_hostile.py`, some hundred cases a reader, and `python -m tests.fuzz`, as many as one likes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mutations import plain
from PIL import Image
from safetensors.torch import save
from small_corpus import LAYOUT, NAMES, build

from lora_diffusion import verify
from lora_diffusion.artifacts import checksum
from lora_diffusion.config import CONFIGS, load_config
from lora_diffusion.corpus import CorpusReader, Manifest, Statistics
from lora_diffusion.corpus.reader import read_statistics
from lora_diffusion.corpus.schema import matrices
from lora_diffusion.corpus.tombstone import is_tombstone
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.faces.apart import is_light
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import open_people
from lora_diffusion.lora import formats
from lora_diffusion.models.kinds import shapes_of
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.pca import PCA, fit_pca
from lora_diffusion.synthesis.publish import read_labels
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.dataset import read_rows
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot, take_snapshot
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.checkpoint import pack, unpack
from lora_diffusion.training.loop import LoopConfig
from lora_diffusion.training.state import TrainingState
from lora_diffusion.verify import examine


@dataclass(frozen=True)
class Reader:
    """`read(folder, data)` puts the bytes where a user would, and reads them. `seeds(folder)`: whole ones.

    `whole`: reads them with all that lies beside them as well, for some cases; a million would take days.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    prepare: Callable[[Path], object] = lambda folder: None
    change: str = "bytes"  # or json, safetensors, http: what the mutations know
    whole: Callable[[Path, bytes], object] | None = None


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
    return [*ours, *plain(ours[0], "safetensors"), save(tensors, {"format": "pt"})]


def _read_lora(folder: Path, data: bytes) -> None:
    formats.read(_put(folder, "x.safetensors", data), LAYOUT, partial=True, ignore_extra=True, svd=True)


def _read_peft(folder: Path, data: bytes) -> None:
    _put(folder, "adapter_config.json", data)
    formats.read(folder, LAYOUT)


def _peft(folder: Path) -> None:
    formats.save(torch.ones(LAYOUT.size), LAYOUT, folder, "peft")


@cache
def _whole_corpus(folder: Path) -> tuple[CorpusReader, CorpusSnapshot]:
    """As it was before one of its files is damaged, with its plan in memory."""
    return CorpusReader(folder), take_snapshot(str(folder))


def _of_corpus(name: str, look: Callable[[Path], Iterator[Callable[[], object]]]) -> Reader:
    """One file of a corpus. `look`: what reads it, each for itself."""

    def prepare(folder: Path) -> None:
        build(open_store(folder), NAMES)
        _ = _whole_corpus(folder)[0].plan.shards

    def read(folder: Path, data: bytes) -> None:
        _put(folder, name, data)
        for step in look(folder):
            with suppress(ValueError):
                step()

    def whole(folder: Path, data: bytes) -> None:
        read(folder, data)
        for step in (_vectors, CorpusReader.failures, CorpusReader.verify, CorpusReader.statistics, _trained_on):
            with suppress(ValueError):
                step(CorpusReader(folder))
        list(examine(str(folder)))

    change = "json" if name.endswith(".json") else "safetensors" if name.endswith(".safetensors") else "bytes"

    def seeds(folder: Path) -> list[bytes]:
        data = (folder / name).read_bytes()
        return [data, *plain(data, change)]

    return Reader(seeds, read, prepare, change, whole)


def _look_at_shard(folder: Path) -> Iterator[Callable[[], object]]:
    reader, snapshot = _whole_corpus(folder)
    yield lambda: reader._verify_one(reader.plan.shards[1], {"00001.safetensors": 0})
    yield lambda: matrices(reader._table(1)["photo_embeddings"])
    yield lambda: list(read_rows(snapshot, 1, reader.store))


def _look_at_failures(folder: Path) -> Iterator[Callable[[], object]]:
    reader, _ = _whole_corpus(folder)
    yield lambda: reader._failures(1, {"num_failure_rows": 2})
    yield lambda: verify._try("failures/00001.parquet", partial(verify._table, reader.store))


def _look_at_plan(folder: Path) -> Iterator[Callable[[], object]]:
    reader = copy(_whole_corpus(folder)[0])
    del reader.__dict__["plan"]
    yield lambda: (
        reader.plan.shards,
        reader.plan.new_part(["dee", "new"]),
        set(filter(is_tombstone, reader.plan.identities)),
    )
    yield lambda: verify._try("plan/00000.parquet", partial(verify._table, reader.store))


def _look_at_manifest(folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: _ids(CorpusReader(folder).manifest)
    yield lambda: verify._try("corpus.json", lambda name: checksum.check_json(open_store(folder).read_json(name)))


def _ids(manifest: Manifest) -> None:
    _ = manifest.identity, manifest.recipe_id, manifest.to_dict(), manifest.recipe_differences(manifest)


def _look_at_shard_statistics(folder: Path) -> Iterator[Callable[[], object]]:
    reader, _ = _whole_corpus(folder)
    yield lambda: read_statistics(reader.store, ["statistics/00000.safetensors"], LAYOUT.size)
    yield lambda: reader._is_whole("statistics/00000.safetensors", 1000)


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
    data = Scores(np.arange(2), array, found, hits, array[:, 0, 0], np.zeros((0, 0, 0, 0, 3), np.uint8)).to_bytes()
    return [data, *plain(data, "safetensors")]


def _statistics(folder: Path) -> list[bytes]:
    data = Statistics.of(np.ones((2, 3))).to_bytes()
    return [data, *plain(data, "safetensors")]


def _checkpoint(folder: Path) -> list[bytes]:
    tensors = {"a": torch.ones(3, 2), "b": torch.ones((), dtype=torch.int64), "c": torch.zeros(0, 4)}
    data = pack(tensors, {"step": 3})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return [data, save(tensors, {key: text for key, text in header.items() if key not in ("checksum", "sha256")})]


def _pca(folder: Path) -> list[bytes]:
    fitted = fit_pca(lambda: [np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)], 2)
    return [pack(dict(fitted.state_dict()), {"data": {"rows": "x"}})]


def _read_pca(folder: Path, data: bytes) -> None:
    saved = unpack(open_store(_put(folder, "pca.safetensors", data).parent), "pca.safetensors")
    assert saved is not None
    PCA.from_tensors(saved[0])


def _training_state(folder: Path) -> TrainingState:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return TrainingState("x", open_store(folder), dict(model.named_parameters()), optimizer, LoopConfig(), {})


def _states(folder: Path) -> list[bytes]:
    _training_state(folder).save(True)
    data = (folder / "checkpoints/x.safetensors").read_bytes()
    return [data, *plain(data, "safetensors")]


def _read_state(folder: Path, data: bytes) -> None:
    _put(folder, "checkpoints/x.safetensors", data)
    _training_state(folder).restore()


def _yaml_seeds(folder: Path) -> list[bytes]:
    """The sections of all files: a whole file takes 25 ms to parse."""
    sections = [part for path in sorted(CONFIGS.glob("*.yaml")) for part in re.split(r"\n(?=\w)", path.read_text())]
    return [re.sub(r" *#.*", "", part).encode()[:400] for part in sections] + [
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
    from synthesis_world import SMALL, untrained

    small = replace(SMALL, width=4, depth=1, condition_width=4, rank=1, generator_width=2)
    untrained("pca", config=small).save_pretrained(folder)
    Synthesizer.from_pretrained(folder)  # what it imports takes seconds


def _of_synthesizer(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        _put(folder, name, data)
        Synthesizer.from_pretrained(folder)

    change = "json" if name == "config.json" else "safetensors"

    def seeds(folder: Path) -> list[bytes]:
        data = (folder / name).read_bytes()
        return [data, *plain(data, change)]

    return Reader(seeds, read, _synthesizer, change)


def _snapshot(folder: Path) -> list[bytes]:
    build(open_store(folder / "corpus"), NAMES)
    return [json.dumps(take_snapshot(str(folder / "corpus")).to_dict()).encode()]


def _read_snapshot(folder: Path, data: bytes) -> None:
    snapshot = CorpusSnapshot.from_dict(open_store(_put(folder, "data.json", data).parent).read_json("data.json"))
    _ = snapshot.key, snapshot.identity, snapshot.num_rows


READERS = {
    "lora": Reader(_lora_seeds, _read_lora, change="safetensors"),
    "peft_config": Reader(lambda folder: [(folder / "adapter_config.json").read_bytes()], _read_peft, _peft, "json"),
    "shard": _of_corpus("shards/00001.parquet", _look_at_shard),
    "failures": _of_corpus("failures/00001.parquet", _look_at_failures),
    "plan": _of_corpus("plan/00000.parquet", _look_at_plan),
    "manifest": _of_corpus("corpus.json", _look_at_manifest),
    "shard_statistics": _of_corpus("statistics/00000.safetensors", _look_at_shard_statistics),
    "statistics": Reader(_statistics, lambda _, data: Statistics.from_bytes(data), change="safetensors"),
    "checkpoint": Reader(
        _checkpoint,
        lambda folder, data: unpack(open_store(_put(folder, "x.safetensors", data).parent), "x.safetensors"),
        change="safetensors",
    ),
    "pca": Reader(_pca, _read_pca, change="safetensors"),
    "training_state": Reader(_states, _read_state, change="safetensors"),
    "scores": Reader(_scores, lambda _, data: Scores.from_bytes(data), change="safetensors"),
    "snapshot": Reader(_snapshot, _read_snapshot, change="json"),
    "yaml": Reader(_yaml_seeds, _read_yaml, change="text"),
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
        lambda _, data: (is_light(data), load_photo(data)),
    ),
}
