"""Where the people come from: a folder for each, a Parquet dataset, or WebDataset tars; local or s3://.

Listing reads names only. Photos are read where the work is done, one person at a time.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.storage import Store, StoreError, open_store

UNFINISHED = "_parts"  # jobs/world/make_faces.py keeps its progress there
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
CAPTIONS = "faces.parquet"  # in the root of a folder source: columns file (relative path) and one of CAPTION_COLUMNS
CAPTION_COLUMNS = ("subject_caption", "caption")  # the first that is there; a caption must not describe the person


@dataclass(frozen=True)
class PersonRef:
    """A person in a source. `where` is the source's own pointer; `problem` (reason, message) rules the person out."""

    identity: str
    where: str = ""
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class RawPhoto:
    """A photo's bytes as they were found; `data` is None if they could not be read, and `error` says why."""

    name: str
    data: bytes | None
    caption: str | None = None
    error: str = ""


class PeopleSource(Protocol):
    uri: str

    def list_people(self) -> list[PersonRef]:
        """Everyone, in any order; each identity once."""
        ...

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        """At most `limit` photos of one person, in the order of their names."""
        ...


def open_people(uri: str) -> PeopleSource:
    """The source at `uri`, recognised by what lies there.

    `x.parquet` or a folder of Parquet files; `x.tar` or a folder of tars; otherwise `<uri>/<identity>/*.jpg`.
    Raises ValueError if there is nothing, or nothing that one of them could read.
    """
    store = open_store(uri)
    for suffix, source in ((".parquet", ParquetPeople), (".tar", TarPeople)):
        if uri.endswith(suffix):
            folder, _, name = uri.rpartition("/")
            return source(open_store(folder or "."), [name], uri)
    files = store.files()
    if store.folders():
        return FolderPeople(store)
    for suffix, source in ((".parquet", ParquetPeople), (".tar", TarPeople)):
        names = sorted(name for name in files if name.endswith(suffix) and name != CAPTIONS)
        if names:
            return source(store, names, uri)
    raise ValueError(
        f"no people found at {uri}: expected a folder for each person ({uri}/<identity>/*.jpg), Parquet files with columns "
        "identity and image, or tar files. For invented people, render some with jobs/world/make_faces.py"
    )


class FolderPeople:
    """`<uri>/<identity>/<photo>`; captions from `<uri>/faces.parquet` if it is there."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.uri = store.uri

    def list_people(self) -> list[PersonRef]:
        return [PersonRef(name) for name in self.store.folders() if not name.startswith(".") and name != UNFINISHED]

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        files = self.store.files(person.identity)
        names = sorted(name for name in files if name.lower().endswith(PHOTO_SUFFIXES) and not name.startswith("."))
        found = []
        for name in names[:limit]:
            path = f"{person.identity}/{name}"
            try:
                found.append(RawPhoto(name, self.store.read(path), self._captions.get(path)))
            except FileNotFoundError as error:
                found.append(RawPhoto(name, None, error=str(error)))
            except StoreError as error:
                if not self.store.local:  # a store that does not answer is no fault of this person
                    raise
                found.append(RawPhoto(name, None, error=str(error)))
        return found

    @property
    def _captions(self) -> Mapping[str, str]:
        return _captions_of(self.store)


@lru_cache(maxsize=4)
def _captions_of(store: Store) -> Mapping[str, str]:
    try:
        data = store.read(CAPTIONS)
    except FileNotFoundError:
        return {}
    try:
        names = pq.read_schema(pa.BufferReader(data)).names
        column = next(name for name in CAPTION_COLUMNS if name in names)
        table = pq.read_table(pa.BufferReader(data), columns=["file", column])
        return dict(zip(table["file"].to_pylist(), table[column].to_pylist(), strict=True))
    except (pa.ArrowInvalid, KeyError, StopIteration) as error:
        raise ValueError(f"{store.uri}/{CAPTIONS} must be Parquet with columns file and caption: {error}") from error


class ParquetPeople:
    """Rows with columns `identity`, `image` and perhaps `caption`.

    `image` is one photo (bytes, or a struct with `bytes` as Hugging Face datasets write it): rows with the same identity
    are photos of one person. Or it is a list of photos (and `caption` a list): one row is one person, and two rows with
    the same identity are two people of one name, who cannot both be in a corpus: neither is taken.
    """

    def __init__(self, store: Store, names: list[str], uri: str) -> None:
        self.store, self.names, self.uri = store, names, uri

    def list_people(self) -> list[PersonRef]:
        rows: dict[str, list[tuple[int, int, int]]] = {}
        unnamed = []
        whole = False
        for number, name in enumerate(self.names):
            parquet = self._open(number)
            field = self._image_field(parquet, name)
            whole = whole or pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
            for group in range(parquet.num_row_groups):
                identities = parquet.read_row_group(group, columns=["identity"])["identity"].cast(pa.string())
                for row, identity in enumerate(identities.to_pylist()):
                    if identity:
                        rows.setdefault(identity, []).append((number, group, row))
                    else:
                        unnamed.append(f"{name}, row group {group}, row {row}")
        people = [PersonRef(identity, json.dumps(places)) for identity, places in rows.items()]
        if whole:
            people = [self._refuse_namesakes(person) for person in people]
        return people + [
            PersonRef(f"(no identity: {place})", problem=("no_identity", f"the row has no identity: {place}"))
            for place in unnamed
        ]

    def _refuse_namesakes(self, person: PersonRef) -> PersonRef:
        places = json.loads(person.where)
        if len(places) == 1:
            return person
        rows = ", ".join(f"{self.names[number]} row group {group} row {row}" for number, group, row in places[:4])
        message = f"{len(places)} rows carry the identity {person.identity!r} ({rows}): give each person its own name"
        return replace(person, problem=("duplicate_identity", message))

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        found: list[RawPhoto] = []
        for number, group, row in json.loads(person.where):
            if len(found) >= limit:
                break
            values = _row_group(self, number, group).slice(row, 1).to_pylist()[0]
            place = f"{self.names[number]}:{group}:{row}"
            images, captions = values["image"], values.get("caption")
            if isinstance(images, list):
                captions = captions if isinstance(captions, list) else [captions] * len(images)
                found += [_photo(f"{place}:{i}", pair) for i, pair in enumerate(zip(images, captions, strict=False))]
            else:
                found.append(_photo(place, (images, captions)))
        return found[:limit]

    def _open(self, number: int) -> pq.ParquetFile:
        name = self.names[number]
        try:
            return pq.ParquetFile(self.store.open(name))
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise ValueError(f"{self.store.uri}/{name} cannot be read as Parquet: {error}") from error

    def _image_field(self, parquet: pq.ParquetFile, name: str) -> pa.Field:
        schema = parquet.schema_arrow
        missing = [column for column in ("identity", "image") if column not in schema.names]
        if missing:
            raise ValueError(
                f"{self.store.uri}/{name} lacks the column {' and '.join(missing)}; it has {', '.join(schema.names)}"
            )
        return schema.field("image")


@lru_cache(maxsize=2)
def _row_group(source: ParquetPeople, number: int, group: int) -> pa.Table:
    parquet = source._open(number)
    wanted = [name for name in ("image", "caption") if name in parquet.schema_arrow.names]
    return parquet.read_row_group(group, columns=wanted)


def _photo(name: str, pair: tuple[Any, str | None]) -> RawPhoto:
    image, caption = pair
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        return RawPhoto(name, None, caption, "the row holds no image bytes")
    return RawPhoto(name, data, caption)


class TarPeople:
    """WebDataset: members `<identity>/<key>.jpg`, or `<identity>.<anything>.jpg`; `<same>.txt` is the caption."""

    def __init__(self, store: Store, names: list[str], uri: str) -> None:
        self.store, self.names, self.uri = store, names, uri

    def list_people(self) -> list[PersonRef]:
        places: dict[str, list[tuple[int, str, int, int]]] = {}
        for number, name in enumerate(self.names):
            with self.store.open(name) as file, self._tar(file, name) as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    if member.isfile() and path.lower().endswith((*PHOTO_SUFFIXES, ".txt")):
                        folder, _, base = path.rpartition("/")
                        identity = folder or base.partition(".")[0]
                        places.setdefault(identity, []).append((number, path, member.offset_data, member.size))
        return [
            PersonRef(identity, json.dumps(sorted(found, key=lambda p: p[1]))) for identity, found in places.items()
        ]

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        places = json.loads(person.where)
        texts = {path.removesuffix(".txt"): place for *place, path in _by_path(places) if path.endswith(".txt")}
        found: list[RawPhoto] = []
        for number, offset, size, path in _by_path(places):
            if path.endswith(".txt") or len(found) >= limit:
                continue
            text = texts.get(path.rpartition(".")[0])
            caption = self._read(*text).decode("utf-8", "replace").strip() if text else None
            found.append(RawPhoto(path, self._read(number, offset, size), caption))
        return found

    def _read(self, number: int, offset: int, size: int) -> bytes:
        with self.store.open(self.names[number]) as file:
            file.seek(offset)
            return file.read(size)

    def _tar(self, file: Any, name: str) -> tarfile.TarFile:
        try:
            return tarfile.open(fileobj=file, mode="r:")  # compressed tars have no offsets to come back to
        except tarfile.TarError as error:
            raise ValueError(f"{self.store.uri}/{name} is not a plain tar file: {error}") from error


def _by_path(places: Iterable[list[Any]]) -> list[tuple[int, int, int, str]]:
    return [(number, offset, size, path) for number, path, offset, size in places]
