"""Photos, and the tars and tables that people and their photos come in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mutations import Reader, put
from PIL import Image

from lora_diffusion.faces.apart import is_light
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.factory.people import open_people
from lora_diffusion.synthesis.publish import read_labels


@cache
def jpeg(seed: int = 0, kind: str = "JPEG") -> bytes:
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
                member.size, member.mtime = len(jpeg()), 0.5
                tar.addfile(member, io.BytesIO(jpeg()))
            link = tarfile.TarInfo("cy/1.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../ada/1.jpg"
            tar.addfile(link)
        seeds.append(buffer.getvalue())
    return seeds


def _people(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        source = open_people(str(put(folder, name, data)))
        for person in source.list_people():
            source.photos(person, 3)

    return read


def _people_table() -> pa.Table:
    return pa.table(
        {"identity": ["ada", "ada", "bo"], "image": [jpeg(0), jpeg(1), jpeg(2)], "caption": ["x", None, "z"]}
    )


def _people_parquet(folder: Path) -> list[bytes]:
    seeds, table = [], _people_table()
    lists = pa.table(
        {"identity": ["ada", None], "image": [[{"bytes": jpeg(), "path": None}], []], "caption": [["x"], None]}
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
    put(folder, "ada/1.jpg", jpeg())


def _read_captions(folder: Path, data: bytes) -> None:
    put(folder, "faces.parquet", data)
    source = open_people(str(folder))
    for person in source.list_people():
        source.photos(person, 3)


def _labels(folder: Path) -> list[bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"identity": ["ada", "bo"], "beard": [0.0, None]}), sink)
    return [sink.getvalue().to_pybytes()]


OF_PEOPLE = {
    "tar": Reader(_tar_seeds, _people("x.tar")),
    "people_parquet": Reader(_people_parquet, _people("x.parquet")),
    "people_arrow": Reader(_people_arrow, _people("x.arrow")),
    "captions": Reader(_captions, _read_captions, _folder_of_people),
    "labels": Reader(_labels, lambda folder, data: read_labels(str(put(folder, "x.parquet", data)))),
    "photo": Reader(
        lambda folder: [jpeg(0, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")],
        lambda _, data: (is_light(data), load_photo(data)),
    ),
}
