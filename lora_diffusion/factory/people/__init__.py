"""Where the people come from: a folder for each, Parquet files, or tars; local or s3://.

Listing reads names and sizes only, and the first bytes of files whose name says nothing. Photos are read where the work
is done, one person at a time. docs/guides/photos.md says what is recognised, what is skipped, and how it is counted.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from itertools import chain

from lora_diffusion.faces.photos import SUFFIXES, special_file
from lora_diffusion.factory.people import parquet, tars
from lora_diffusion.factory.people.folders import CAPTIONS, FolderPeople
from lora_diffusion.factory.people.parquet import ParquetPeople, is_table
from lora_diffusion.factory.people.sorting import sort_out
from lora_diffusion.factory.people.source import Found, PeopleSource, PersonRef, RawPhoto, counted
from lora_diffusion.factory.people.tars import TarPeople
from lora_diffusion.factory.people.walk import walk
from lora_diffusion.storage import Store, open_store

__all__ = ["Found", "PeopleSource", "PersonRef", "RawPhoto", "open_people"]

_EXPECTED = (
    "a folder for each person ({uri}/<identity>/*.jpg), Parquet files with columns identity and image, or tar files; "
    "the corpus job makes invented people for people=synthetic:40"
)


def open_people(uri: str) -> PeopleSource:
    """The source at `uri`, recognised by what lies there: Parquet files with the right columns, then folders, then tars.

    Raises ValueError if the place does not exist, or holds nothing that one of the sources could read.
    """
    store = open_store(uri)
    if store.local and not os.path.isdir(store.root):
        return _single_file(uri, store.root)
    if not store.local and uri.lower().endswith((*parquet.SUFFIXES, *tars.SUFFIXES)):
        return _by_name(uri, uri.lower())
    tables: list[str] = []
    archives: list[str] = []
    fits = False
    looking = walk(store)
    root = [next(looking)]
    for folder, entries in chain(root, walk(store, "data"), looking):  # data: where hubs put Parquet, beside pictures
        names = [entry.path for entry in entries if not entry.problem]
        here = [name for name in names if is_table(name) and name != CAPTIONS]
        fits = fits or (bool(here) and ParquetPeople(store, here[:1], uri).fits())
        tables += here
        archives += [name for name in names if name.lower().endswith(tars.SUFFIXES)]
        if folder and not fits and sort_out(entries, FolderPeople(store).peek, count=False).photos:
            return FolderPeople(store)
    if tables:
        return ParquetPeople(store, sorted(set(tables)), uri)
    if archives:
        return TarPeople(store, sorted(set(archives)), uri)
    raise ValueError(f"no people found at {uri}: {_what_lies(store)}expected {_EXPECTED.format(uri=uri)}")


def _single_file(uri: str, path: str) -> PeopleSource:
    try:
        special = special_file(os.stat(path).st_mode)
    except OSError as error:
        expected = _EXPECTED.format(uri=uri)
        raise ValueError(f"{uri} does not exist ({error.strerror}): people must name {expected}") from None
    if special:
        raise ValueError(f"{uri} is {special}: people must name {_EXPECTED.format(uri=uri)}")
    if path.lower().endswith((*parquet.SUFFIXES, *tars.SUFFIXES)):
        return _by_name(uri, path.lower())
    if path.lower().endswith(SUFFIXES):
        raise ValueError(f"{uri} is one file: people must name {_EXPECTED.format(uri=os.path.dirname(uri))}")
    return _by_name(uri, "x.tar" if tarfile.is_tarfile(path) else "x.parquet")


def _by_name(uri: str, name: str) -> PeopleSource:
    folder, _, file = uri.rpartition("/")
    store = open_store(folder or ".")
    if not store.local and not store.exists(file):
        raise ValueError(f"{uri} does not exist: people must name {_EXPECTED.format(uri=store.uri)}")
    return (ParquetPeople if name.endswith(parquet.SUFFIXES) else TarPeople)(store, [file], uri)


def _what_lies(store: Store) -> str:
    found: Counter[str] = Counter()
    for _, entries in walk(store):
        here = sort_out(entries, FolderPeople(store).peek)
        found.update(here.skipped)
        found["stray photo"] += len(here.photos)
    return f"there lie {counted(found)}; " if any(found.values()) else ""
