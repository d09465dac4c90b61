"""WebDataset: members `<identity>/<key>.jpg`, or `<identity>.<anything>.jpg`; `<same>.txt` is the caption. Consent is the key `consent` of
each `<same>.json`, or a member `<identity>/consent.txt`.

Plain tars are read where their bytes lie. Compressed ones have no places to come back to: they are unpacked into a
temporary file first, in each process that reads them.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import IO, Any

import pyarrow as pa

from lora_diffusion.faces.photos import PhotoError, check_size
from lora_diffusion.factory.people.folders import caption_text
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
from lora_diffusion.factory.people.walk import Entry, hidden
from lora_diffusion.storage import Store, StoreError

SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_UNPACKED_AT_ONCE = 4
_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}


class TarPeople:
    def __init__(self, store: Store, names: list[str], uri: str) -> None:
        self.store, self.names, self.uri, self.found = store, names, uri, Found()
        self._unpacked: dict[str, IO[bytes] | None] = {}  # None: a plain tar

    def list_people(self) -> list[PersonRef]:
        folders: dict[str, list[Entry]] = {}
        stamps = {name: self.store.stamp(name) for name in self.names}
        for name in self.names:
            for entry in self._members(name):
                folder = entry.path.rpartition("/")[0]
                if entry.path.endswith("/."):
                    folders.setdefault(folder, [])
                else:
                    folders.setdefault(folder, []).append(entry)
        outside = folders.pop("", [])
        root = sort_out(outside, self.peek, count=False)
        sidecars = _sidecars(outside)
        for photo in root.photos:
            flat = folders.setdefault(os.path.basename(photo.path).partition(".")[0], [])
            flat += [photo, *filter(None, [root.captions.get(photo), sidecars.get(_stem(photo))])]
        sorted_ = {folder: sort_out(dict.fromkeys(entries), self.peek) for folder, entries in folders.items()}
        self._check(stamps)
        people, found = people_in(self.uri, sorted_, root, link_people(outside))
        tars = [{e.place[0] for folder in inner for e in folders[folder] if e.place[0]} for _, inner in people]
        spread = sum(len(names) > 1 for names in tars)
        note = f"people in more than one tar, whose photos are taken together: {spread:,}"
        self.found = replace(found, notes=(*found.notes, *([note] if spread else [])))
        return [
            person
            if person.problem
            else replace(person, where=_where([(sorted_[f], folders[f]) for f in inner], stamps))
            for person, inner in people
        ]

    def _check(self, tars: dict[str, str]) -> None:
        """Raises StoreError if a tar is not the one that was listed: at a place in it there may be another person now."""
        for name, stamp in tars.items():
            if self.store.stamp(name) != stamp:
                raise StoreError(
                    f"{self.store.uri}/{name} was changed since its people were listed: give the same command again"
                )

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        if person.problem:
            return []
        places, _, tars = json.loads(person.where)
        found = distinct(self._read_all(places), limit)
        self._check(tars)
        return found

    def consent(self, person: PersonRef) -> str | None:
        _, places, tars = json.loads(person.where or "[[], [], {}]")
        consent = consent_of(_consent(name, self._read(*place)) if place else None for name, place in places)
        self._check(tars)
        return consent

    def peek(self, entry: Entry, start: int, count: int) -> bytes:
        name, offset = entry.place
        return self._read(name, offset + start, max(0, min(count, entry.size - start)))

    def _read_all(self, places: list[list[Any]]) -> Iterator[RawPhoto]:
        for path, problem, place, text in places:
            if problem:
                yield RawPhoto(path, None, error=problem)
                continue
            try:
                check_size(place[2])
                yield RawPhoto(path, self._read(*place), caption_text(self._read(*text)) if text else None)
            except PhotoError as error:
                yield RawPhoto(path, None, error=str(error), reason=error.reason)

    def _read(self, name: str, offset: int, size: int) -> bytes:
        unpacked = self._plain(name)
        if unpacked is None:
            return self.store.read_part(name, offset, size)
        return os.pread(unpacked.fileno(), min(size, os.fstat(unpacked.fileno()).st_size), offset)

    def _members(self, name: str) -> Iterator[Entry]:
        """Files and links of one tar, a folder as `name/.`; of several members of one name the last, as tar unpacks them."""
        where = f"{self.store.uri}/{name}"
        files: dict[str, Entry] = {}
        links: dict[str, str] = {}
        try:
            with self.store.open(name) as file, self._tar(self._plain(name) or file) as tar:
                for member in tar:
                    path = _clean(member.name)
                    if member.isfile():
                        files[path] = Entry(path, member.size, place=(name, member.offset_data))
                    elif member.isdir():
                        files[f"{path}/."] = Entry(f"{path}/.")
                    elif member.issym() or member.islnk():
                        base = posixpath.dirname(path) if member.issym() else ""
                        links[path] = _clean(posixpath.normpath(posixpath.join(base, member.linkname)))
                    else:
                        files[path] = Entry(path, problem=("special file", f"{where}: {shown(path)} is no file"))
        except OSError:
            raise
        except Exception as error:  # damaged headers meet the parser with many kinds of error
            raise ValueError(f"{where} is no whole tar file: {error}. Copy it again") from error
        for path, target in links.items():
            message = f"{where}: {shown(path)} is a link to {shown(target)}, which is no file in it"
            missing = Entry(path, problem=("broken link", message))
            files[path] = files[target]._replace(path=path) if target in files else missing
        hidden_before: set[str] = set()
        for entry in files.values():
            parts = entry.path.removesuffix("/.").split("/")
            cut = next((i for i, part in enumerate(parts) if hidden(part)), None)
            if cut is None:
                yield entry
            elif (path := "/".join(parts[: cut + 1])) not in hidden_before:
                hidden_before.add(path)
                yield Entry(path)

    def _tar(self, file: IO[bytes]) -> tarfile.TarFile:
        file.seek(0)
        return tarfile.open(fileobj=file, mode="r:")

    def _plain(self, name: str) -> IO[bytes] | None:
        """The unpacked tar; None if it is not compressed."""
        if name in self._unpacked:
            return self._unpacked[name]
        head = self.store.read_part(name, 0, 8)
        unpack = next((unpack for magic, unpack in _COMPRESSED.items() if head.startswith(magic)), None)
        unpacked = None
        if unpack:
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                with self.store.open(name) as file:
                    shutil.copyfileobj(unpack(file), unpacked, 2**20)
            except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
                if getattr(error, "errno", None):  # of the disk or the store, not of what was read
                    raise StoreError(
                        f"cannot unpack {self.store.uri}/{name} in {tempfile.gettempdir()}: {error}"
                    ) from error
                raise ValueError(f"{self.store.uri}/{name} is cut short or damaged: {error}. Copy it again") from error
            open_ones = [other for other, file in self._unpacked.items() if file]
            for other in open_ones[: len(open_ones) + 1 - _UNPACKED_AT_ONCE]:
                self._unpacked.pop(other)
        self._unpacked[name] = unpacked
        return unpacked


def _stem(entry: Entry) -> tuple[str, str]:
    """What a photo and the members that speak of it have in common: the tar, and the path without its suffix."""
    return entry.place[0], entry.path.rpartition(".")[0]


def _sidecars(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    return {_stem(entry): entry for entry in entries if entry.path.lower().endswith(".json") and not entry.problem}


def _consents(folders: list[tuple[Sorted, list[Entry]]]) -> list[tuple[str, list[Any] | None]]:
    """(name, place) of what speaks of consent: `consent.txt` for all, or else of each photo its sidecar, which may be missing."""
    entries = [entry for _, some in folders for entry in some if not entry.problem]
    texts = [entry for entry in dict.fromkeys(entries) if os.path.basename(entry.path) == CONSENT]
    sidecars = _sidecars(entries)
    photos = [photo for found, _ in folders for photo in found.photos if not photo.problem]
    wanted: list[tuple[Entry, Entry | None]] = [(text, text) for text in texts]
    wanted = wanted or [(photo, sidecars.get(_stem(photo))) for photo in photos]
    return [
        (shown((entry or photo).path), [*entry.place, min(entry.size, CONSENT_BYTES)] if entry else None)
        for photo, entry in wanted
    ]


def _where(folders: list[tuple[Sorted, list[Entry]]], stamps: dict[str, str]) -> str:
    """Photos and what speaks of consent, with their places; and what each of their tars was when it was listed."""
    places, consents = _places(found for found, _ in folders), _consents(folders)
    of = [place for _, problem, photo, text in places if not problem for place in (photo, text)]
    names = {place[0] for place in [*of, *(place for _, place in consents)] if place}
    return json.dumps([places, consents, {name: stamps[name] for name in sorted(names)}])


def _consent(name: str, data: bytes) -> Any:
    if not name.lower().endswith(".json"):
        return data.decode("utf-8-sig", "replace")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values.get("consent") if isinstance(values, dict) else None


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _places(folders: Iterator[Sorted]) -> list[tuple[str, str, list[Any], list[Any] | None]]:
    """(path, problem, place, place of the caption) of each photo; a place is the tar's name, offset and size."""
    found = []
    for folder in folders:
        for photo in folder.photos:
            text = folder.captions.get(photo)
            problem = photo.problem[1] if photo.problem else ""
            place = [*photo.place, photo.size]
            found.append((shown(photo.path), problem, place, [*text.place, text.size] if text else None))
    return sorted(found)
