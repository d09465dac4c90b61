"""Parquet files, and the Arrow files of Hugging Face's `save_to_disk`: rows with the columns `identity` and `image`.

A folder `identity=ada` may stand for the column.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_diffusion.factory.people.sorting import sort_out
from lora_diffusion.factory.people.source import Found, PersonRef, RawPhoto, consent_of, distinct
from lora_diffusion.factory.people.walk import walk
from lora_diffusion.storage import Store, StoreError

SUFFIXES = (".parquet", ".arrow")
_HIVE = re.compile(r"(?:^|/)identity=([^/]+)/")


class ParquetPeople:
    """Rows with columns `identity`, `image` and perhaps `caption`.

    `image` is one photo (bytes, or a struct with `bytes` as Hugging Face datasets write it): rows with the same identity
    are photos of one person. Or it is a list of photos (and `caption` a list): one row is one person, and two rows with
    the same identity are two people of one name, who cannot both be in a corpus: neither is taken.
    """

    def __init__(self, store: Store, names: list[str], uri: str) -> None:
        self.store, self.names, self.uri, self.found = store, names, uri, Found()

    def list_people(self) -> list[PersonRef]:
        rows: dict[str, list[tuple[str, int, int]]] = {}
        broken = []
        whole, photos = False, 0
        for name in self.names:
            parquet = self._open(name)
            field = self._image_field(parquet, name)
            whole = whole or _is_list(field.type)
            for group in range(parquet.num_row_groups):
                photos += self._count(parquet, name, group)
                for row, identity in enumerate(self._identities(parquet, name, group)):
                    place = f"{name}, row group {group}, row {row}"
                    text = (identity or b"").decode("utf-8", "backslashreplace")
                    if not identity:
                        problem = ("no_identity", f"the row has no identity: {place}")
                        broken.append(PersonRef(f"(no identity: {place})", problem=problem))
                    elif text.encode() != identity:
                        problem = ("name_not_utf8", f"the identity is not UTF-8: {place}")
                        broken.append(PersonRef(f"{text} ({place})", problem=problem))
                    else:
                        rows.setdefault(text, []).append((name, group, row))
        people = [PersonRef(identity, json.dumps(places)) for identity, places in rows.items()]
        if whole:
            people = [self._refuse_namesakes(person) for person in people]
        skipped = self._beside()
        skipped["unnamed row"] = len(broken)
        usable = sum(person.problem is None for person in people)
        self.found = Found(usable, photos, skipped)
        return people + broken

    def _refuse_namesakes(self, person: PersonRef) -> PersonRef:
        places = json.loads(person.where)
        if len(places) == 1:
            return person
        rows = ", ".join(f"{name} row group {group} row {row}" for name, group, row in places[:4])
        message = f"{len(places)} rows carry the identity {person.identity!r} ({rows}): give each person its own name"
        return replace(person, problem=("duplicate_identity", message))

    def _beside(self) -> Counter[str]:
        """What lies beside the Parquet files."""
        found: Counter[str] = Counter()
        if f"{self.store.uri}/{self.names[0]}" != self.uri:
            for _, entries in walk(self.store):
                rest = sort_out((e for e in entries if e.path not in self.names), lambda *_: b"")
                found.update(rest.skipped)
                found["stray photo"] += rest.good
        return found

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        return [] if person.problem else distinct(self._read_all(person), limit)

    def consent(self, person: PersonRef) -> str | None:
        rows = [self._row(person, *place) for place in json.loads(person.where or "[]")]
        return consent_of(values.get("consent") for values in rows)

    def _read_all(self, person: PersonRef) -> Iterator[RawPhoto]:
        for name, group, row in json.loads(person.where):
            values = self._try(name, partial(self._row, person, name, group, row))
            place = f"{name}:{group}:{row}"
            images, captions = values["image"], values.get("caption")
            if isinstance(images, list):
                captions = (captions if isinstance(captions, list) else [captions] * len(images))[: len(images)]
                yield from (_photo(f"{place}:{i}", *pair) for i, pair in enumerate(zip_longest(images, captions)))
            else:
                yield _photo(place, images, captions)

    def _row(self, person: PersonRef, name: str, group: int, row: int) -> dict[str, Any]:
        """Raises StoreError if it is not the person's any more: the file was written anew since everybody was listed."""
        try:
            table, names = _row_group(self, name, group)
            if names[row] == person.identity.encode():
                return dict(table.slice(row, 1).to_pylist()[0])
        except (FileNotFoundError, IndexError, pa.ArrowIndexError):
            pass
        raise StoreError(
            f"{self.store.uri}/{name} was changed since its people were listed: give the same command again"
        )

    def _identities(self, parquet: _File, name: str, group: int) -> list[bytes | None]:
        return self._try(name, lambda: self._read_identities(parquet, name, group))

    def _read_identities(self, parquet: _File, name: str, group: int) -> list[bytes | None]:
        if "identity" not in parquet.schema_arrow.names:
            return [_hive_identity(name)] * len(self._read(parquet, name, group, ["image"]))
        column = self._read(parquet, name, group, ["identity"])["identity"]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            column = column.cast(pa.string())
        return column.cast(pa.binary()).to_pylist()

    def _count(self, parquet: _File, name: str, group: int) -> int:
        """Photos of a row group, without reading them all."""
        if isinstance(parquet, _ArrowFile):
            images = parquet.table["image"]
            return int(pc.sum(pc.list_value_length(images)).as_py() or 0) if _is_list(images.type) else len(images)
        columns = parquet.metadata.row_group(group)
        if not _is_list(parquet.schema_arrow.field("image").type):
            return int(columns.num_rows)
        # What a damaged footer says of a column ends the process if it is asked for from Python, and is an error if read: the images
        # are read first, and no other column is asked.
        again: Any = self._open(name, buffer_size=2**20)  # reads a page, not the column
        self._try(name, lambda: next(again.iter_batches(1, [group], ["image"]), None))
        paths = [parquet.schema.column(leaf).path.split(".")[0] for leaf in range(columns.num_columns)]
        return int(columns.column(paths.index("image")).num_values)

    def _open(self, name: str, **options: Any) -> _File:
        if name.lower().endswith(".arrow"):
            return self._try(name, lambda: _ArrowFile(self.store, name))
        return self._try(
            name, lambda: pq.ParquetFile(self.store.open(name), page_checksum_verification=True, **options)
        )

    def _read(self, parquet: _File, name: str, group: int, columns: list[str]) -> pa.Table:
        return self._try(name, lambda: parquet.read_row_group(group, columns=columns))

    def _try(self, name: str, read: Callable[[], Any]) -> Any:
        """Raises ValueError with the file's name for whatever a damaged one makes Arrow raise."""
        try:
            return read()
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # damaged bytes meet Arrow with many kinds of error
            if str(error).startswith(f"{self.store.uri}/"):
                raise  # it is named already
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> Exception:
        message = f"{self.store.uri}/{name} cannot be read as {'Arrow' if name.lower().endswith('.arrow') else 'Parquet'}: {error}"
        lost = isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not self.store.local
        return StoreError(message) if lost else ValueError(message)

    def _image_field(self, parquet: _File, name: str) -> pa.Field:
        schema = parquet.schema_arrow
        missing = [column for column in ("identity", "image") if column not in schema.names]
        if _hive_identity(name) and "identity" in missing:
            missing.remove("identity")
        if missing:
            raise ValueError(
                f"{self.store.uri}/{name} lacks the column {' and '.join(missing)}; it has {', '.join(schema.names)}"
            )
        return schema.field("image")

    def fits(self) -> bool:
        """Whether the first file can be read and has the columns."""
        try:
            self._image_field(self._open(self.names[0]), self.names[0])
        except ValueError:
            return False
        return True


class _ArrowFile:
    """The methods of `ParquetFile` that are used here; a local file is mapped, not read."""

    num_row_groups = 1

    def __init__(self, store: Store, name: str) -> None:
        source = pa.memory_map(store.path(name)) if store.local else pa.BufferReader(store.read(name))
        self.table = pa.ipc.open_stream(source).read_all()
        self.table.validate(full=True)  # or else a damaged file's offsets lead out of it, and the process ends
        self.schema_arrow = self.table.schema

    def read_row_group(self, group: int, columns: list[str]) -> pa.Table:
        return self.table.select(columns)


_File: TypeAlias = pq.ParquetFile | _ArrowFile


def is_table(name: str) -> bool:
    """Not one that Spark still writes (`_temporary/0/x.parquet`), nor what `datasets` keeps of a `map` (`cache-1f.arrow`)."""
    unfinished = any(part.startswith(("_", "cache-")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not unfinished


@lru_cache(maxsize=2)
def _row_group(source: ParquetPeople, name: str, group: int) -> tuple[pa.Table, list[bytes | None]]:
    """Its rows, and whose they are."""
    parquet = source._open(name)
    wanted = [name for name in ("image", "caption", "consent") if name in parquet.schema_arrow.names]
    table = source._read(parquet, name, group, wanted)
    if "identity" not in parquet.schema_arrow.names:
        return table, [_hive_identity(name)] * len(table)
    return table, source._identities(parquet, name, group)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) and not pa.types.is_struct(kind)


def _hive_identity(name: str) -> bytes | None:
    found = _HIVE.search(name)
    return unquote(found[1]).encode() if found else None


def _photo(name: str, image: Any, caption: Any) -> RawPhoto:
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return RawPhoto(name, data, caption if isinstance(caption, str) else None)
    elsewhere = f", only the path {image['path']!r}" if isinstance(image, dict) and image.get("path") else ""
    return RawPhoto(name, None, error=f"the row holds no image bytes{elsewhere}")
