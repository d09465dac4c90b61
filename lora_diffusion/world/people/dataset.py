"""A folder of synthetic people: photos in one folder for each person, and one table that says what is in them.

    <uri>/person-020000/00.jpg     view 0 of person 20,000
    <uri>/faces.parquet            one row per photo (SCHEMA), sorted by person and view
    <uri>/faces.json               what all photos have in common: size, quality, population

The work is cut into tasks of a few people; each writes its photos first and then its rows, as one file in `.parts/`.
Whoever has rows is done, so the same command after a kill goes on where it stopped. `finish` merges the parts into the
table. Photos and table depend on the numbers alone: not on tasks, interruptions or the number of machines.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lora_diffusion.storage import Store, open_store
from lora_diffusion.world.people.captions import describe_person, describe_view, subject_caption
from lora_diffusion.world.people.people import SEED, Person, sample_person, sample_view, split_of
from lora_diffusion.world.people.pose import wears_glasses
from lora_diffusion.world.people.renderer import Rendering, render
from lora_diffusion.world.people.views import View

TABLE, MANIFEST, PARTS = "faces.parquet", "faces.json", ".parts"
FORMAT_VERSION = 1
ROWS_PER_GROUP = 10_000  # of the table: a fixed number, so that the same rows give the same file

SCHEMA = pa.schema(
    [
        pa.field("identity", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # relative to the folder
        pa.field("split", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("subject_caption", pa.string(), nullable=False),  # for fine-tuning: says all but who it is
        pa.field(
            "attributes",
            pa.struct(
                [
                    ("expression", pa.string()),
                    ("yaw", pa.float32()),  # head against the camera, degrees, positive to the viewer's right
                    ("pitch", pa.float32()),
                    ("roll", pa.float32()),
                    ("light", pa.string()),
                    ("background", pa.string()),
                    ("cloth", pa.string()),
                    ("neck", pa.string()),
                    ("accessory", pa.string()),
                    ("glasses", pa.bool_()),  # seen in this photo
                ]
            ),
            nullable=False,
        ),
        pa.field("landmarks", pa.list_(pa.float32(), 10), nullable=False),  # x, y of 5 points, as Rendering.landmarks
        pa.field("face_box", pa.list_(pa.float32(), 4), nullable=False),  # as Rendering.face_box
    ]
)


@dataclass(frozen=True)
class FacesConfig:
    """Which photos to draw of each person."""

    views: int = 8  # of each person, numbered from 0
    size: int = 64  # pixels on a side
    quality: int = 95  # of the JPEG files (no chroma subsampling)

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views={self.views}: expected at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: expected 1 to 100")

    def manifest(self) -> dict[str, Any]:
        """What all photos of one folder must share. The number of views may grow."""
        return {"format_version": FORMAT_VERSION, "population": SEED, "size": self.size, "quality": self.quality}


class FacesFolder:
    """The folder as a whole: what is done, what is missing, and the table at the end. One process per folder."""

    def __init__(self, uri: str, config: FacesConfig) -> None:
        self.config = config
        self.store = open_store(uri)

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` who are not done yet, sorted. Claims the folder: ValueError if it holds other photos."""
        numbers = sorted(set(numbers))
        for number in numbers[:1] + numbers[-1:]:
            split_of(number)  # refuses numbers that are nobody's
        self._claim()
        done = self._done()
        return [number for number in numbers if number not in done]

    def finish(self) -> pa.Table:
        """Merges the parts into the table, which it returns. To be repeated after a kill: nothing is lost."""
        parts = self._parts()
        if not parts and self.store.exists(TABLE):
            return _read(self.store, TABLE)
        tables = [_read(self.store, TABLE)] if self.store.exists(TABLE) else []
        tables += [_read(self.store, f"{PARTS}/{part}") for part in parts]
        table = _sorted_rows(pa.concat_tables(tables) if tables else SCHEMA.empty_table())
        self.store.write(TABLE, _to_parquet(table))
        for part in parts:  # only now: the table holds their rows
            self.store.delete(f"{PARTS}/{part}")
        if self.store.local and self.store.filesystem.exists(self.store.path(PARTS)):
            with suppress(OSError):  # something of the user's lies there
                self.store.filesystem.rmdir(self.store.path(PARTS))
        return table

    def _parts(self) -> list[str]:
        """Names as `FacesWriter` gives them: what else lies there is not ours."""
        return sorted(name for name in self.store.files(PARTS) if re.fullmatch(r"[0-9]{6,}-[0-9]{6,}\.parquet", name))

    def _claim(self) -> None:
        wanted = self.config.manifest()
        try:
            found = self.store.read_json(MANIFEST)
        except FileNotFoundError:
            self.store.write_json(MANIFEST, wanted)
            return
        differences = [
            f"{key} {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value
        ]
        if differences:
            raise ValueError(f"{self.store.uri} holds photos of {', '.join(differences)}; choose another folder")

    def _done(self) -> set[int]:
        """Numbers of the people with a row for each of the views that are wanted."""
        self.store.sweep(PARTS)
        names = [f"{PARTS}/{part}" for part in self._parts()]
        names += [TABLE] if self.store.exists(TABLE) else []
        views: dict[int, set[int]] = {}
        for name in names:
            rows = _read(self.store, name, ["number", "view"])
            for number, view in zip(rows["number"].to_pylist(), rows["view"].to_pylist(), strict=True):
                views.setdefault(number, set()).add(view)
        wanted = set(range(self.config.views))
        return {number for number, seen in views.items() if wanted <= seen}


class FacesWriter:
    """Draws and writes the people of one task. Safe to repeat: the same numbers give the same bytes."""

    def __init__(self, uri: str, config: FacesConfig) -> None:
        self.uri = uri
        self.config = config

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """``task["numbers"]``: person numbers -> ``people``, ``photos``, ``seconds``. StoreError if it cannot write."""
        start = time.perf_counter()
        numbers = [int(number) for number in task["numbers"]]
        store = open_store(self.uri)
        rows = [row for number in numbers for row in self._write_person(store, sample_person(number))]
        name = f"{PARTS}/{numbers[0]:06d}-{numbers[-1]:06d}.parquet"
        store.write(name, _to_parquet(pa.Table.from_pylist(rows, schema=SCHEMA)))
        return {"people": len(numbers), "photos": len(rows), "seconds": time.perf_counter() - start}

    def _write_person(self, store: Store, person: Person) -> list[dict[str, Any]]:
        store.sweep(person.name)
        rows = []
        for index in range(self.config.views):
            view = sample_view(person.number, index)
            drawn = render(person, view, self.config.size)
            file = f"{person.name}/{index:02d}.jpg"
            store.write(file, _to_jpeg(drawn.image, self.config.quality))
            rows.append(_row(person, index, view, drawn, file))
        return rows


def _row(person: Person, index: int, view: View, drawn: Rendering, file: str) -> dict[str, Any]:
    who, how = describe_person(person.traits, person.latents), describe_view(view, person.traits)
    return {
        "identity": person.name,
        "number": person.number,
        "view": index,
        "file": file,
        "split": person.split,
        "caption": f"a photo of {who}, {how}",
        "subject_caption": subject_caption(view, person.traits),
        "attributes": {
            **{name: view[name] for name in ("expression", "pitch", "roll", "light", "background", "cloth", "neck")},
            "yaw": view.yaw + view.cam_yaw,
            "accessory": view.accessory,
            "glasses": wears_glasses(person.traits, view),
        },
        "landmarks": drawn.landmarks.ravel().tolist(),
        "face_box": drawn.face_box.tolist(),
    }


def _to_jpeg(image: np.ndarray[Any, Any], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)  # 0: 4:4:4, colour at full resolution
    return buffer.getvalue()


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_PER_GROUP, write_page_checksum=True)
    return buffer.getvalue()


def _read(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    with store.open(name) as stream:
        return pq.read_table(stream, columns=columns, page_checksum_verification=True)


def _sorted_rows(table: pa.Table) -> pa.Table:
    """One row for each (number, view), in that order. Rows that come twice are equal: any of them will do."""
    key = table["number"].to_numpy().astype(np.int64) * 2**16 + table["view"].to_numpy()
    _, first = np.unique(key, return_index=True)
    return table.take(first).combine_chunks()
