"""`<uri>/<identity>/<photo>`, also in folders below; captions from `<uri>/faces.parquet`, or from a text beside each photo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from lora_diffusion.faces.photos import PhotoError, check_size
from lora_diffusion.factory.people import parquet
from lora_diffusion.factory.people.sorting import Sorted, link_people, people_in, sort_out
from lora_diffusion.factory.people.source import (
    CONSENT,
    CONSENT_BYTES,
    Found,
    PersonRef,
    RawPhoto,
    consent_of,
    distinct,
    shown,
)
from lora_diffusion.factory.people.walk import Entry, walk
from lora_diffusion.storage import Store, StoreError

CAPTIONS = "faces.parquet"  # in the root: columns file (relative path) and one of CAPTION_COLUMNS
CAPTION_COLUMNS = ("subject_caption", "caption")  # the first that is there; a caption must not describe the person
_OURS = (CAPTIONS, "faces.json")


class FolderPeople:
    def __init__(self, store: Store) -> None:
        self.store, self.uri, self.found = store, store.uri, Found()

    def list_people(self) -> list[PersonRef]:
        _ = self._captions  # what is wrong with them is wrong for everybody
        folders: dict[str, Sorted] = {}
        links = []
        for folder, entries in walk(self.store):
            if not folder:
                entries = [entry for entry in entries if entry.path not in _OURS]
                links = link_people(entries)
            for table in (e.path for e in entries if parquet.is_table(e.path) and not e.problem):
                if parquet.ParquetPeople(self.store, [table], self.uri).fits():
                    raise ValueError(
                        f"{self.uri} holds both folders of photos and Parquet files of people ({table}): name one of them, "
                        f"as in people={self.uri}/{table.rpartition('/')[0] or table}"
                    )
            folders[folder] = here = sort_out(entries, self.peek)
            if not folder:
                here.skipped["stray photo"] = len(here.photos)
            del here.photos[1:]  # it is enough to know that there are some
        root = folders.pop("", Sorted())
        people, self.found = people_in(self.uri, folders, root, links)
        return [person for person, _ in people]

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        if person.problem:
            return []
        folder = person.where or person.identity
        entries = [entry for _, some in walk(self.store, folder) for entry in some]
        return distinct(self._read_all(folder, sort_out(entries, self.peek, count=False)), limit)

    def consent(self, person: PersonRef) -> str | None:
        try:
            data = self.store.read_part(f"{person.where or person.identity}/{CONSENT}", 0, CONSENT_BYTES)
        except FileNotFoundError:
            return None
        return consent_of([data.decode("utf-8-sig", "replace")])

    def peek(self, entry: Entry, start: int, count: int) -> bytes:
        try:
            return self.store.read_part(entry.path, start, count)
        except (FileNotFoundError, StoreError):
            if not self.store.local:
                raise
            return b""  # reading it says why

    def _read_all(self, folder: str, found: Sorted) -> Iterator[RawPhoto]:
        try:
            captions = self._captions
        except ValueError as error:  # it was well when everybody was listed
            raise StoreError(f"{error}. Mend it, and give the same command again") from error
        for entry in found.photos:
            name = shown(entry.path.removeprefix(f"{folder}/"))
            caption = captions.get(entry.path)
            try:
                if entry.problem:
                    raise PhotoError("unreadable", entry.problem[1])
                check_size(entry.size)
                if caption is None and entry in found.captions:
                    caption = caption_text(self.store.read(found.captions[entry].path))
                yield RawPhoto(name, self.store.read(entry.path), caption)
            except PhotoError as error:
                yield RawPhoto(name, None, error=str(error), reason=error.reason)
            except FileNotFoundError as error:
                yield RawPhoto(name, None, error=str(error))
            except StoreError as error:
                if not self.store.local:  # a store that does not answer is no fault of this person
                    raise
                yield RawPhoto(name, None, error=str(error))

    @cached_property
    def _captions(self) -> Mapping[str, str]:
        try:
            data = self.store.read(CAPTIONS)
        except FileNotFoundError:
            return {}
        try:
            names = pq.read_schema(pa.BufferReader(data)).names
            column = next(name for name in CAPTION_COLUMNS if name in names)
            table = pq.read_table(pa.BufferReader(data), columns=["file", column]).cast(
                pa.schema([("file", pa.string()), (column, pa.string())])
            )
            return dict(zip(table["file"].to_pylist(), table[column].to_pylist(), strict=True))
        except Exception as error:  # damaged bytes meet Arrow with many kinds of error
            raise ValueError(
                f"{self.uri}/{CAPTIONS} must be Parquet with columns file and caption, both text: {error}"
            ) from error


def caption_text(data: bytes) -> str | None:
    """The caption in a text file; None if it is empty."""
    return data.decode("utf-8-sig", "replace").strip() or None
