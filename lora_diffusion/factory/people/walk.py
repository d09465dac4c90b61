"""All files below a folder or a bucket's prefix, folder by folder, without reading any.

Links are followed once: a link that leads back, or to a folder that is walked anyway, is an entry with a problem.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from lora_diffusion.faces.photos import special_file
from lora_diffusion.storage import Store

_SYSTEM = {  # what desktops, cameras' computers and file servers leave behind, in lower case
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"),
    *("system volume information", "lost+found"),
}


class Entry(NamedTuple):
    """A file, by its path below the source. A folder that is not entered has a path that ends in `/`."""

    path: str
    size: int = 0
    tag: str = ""  # of S3: the same for the same bytes, mostly
    problem: tuple[str, str] | None = None  # kind, and a sentence: it cannot be read
    place: tuple[str, int] = ("", 0)  # in tars: which one, and where its bytes begin


def hidden(name: str) -> bool:
    """Whether a file or folder is no part of the data: `.DS_Store`, AppleDouble's `._x`, `.cache`, `__MACOSX`, ..."""
    return name.startswith(".") or name.lower() in _SYSTEM


def walk(store: Store, folder: str = "") -> Iterator[tuple[str, list[Entry]]]:
    """(folder, its entries), the root first. Nothing if `folder` does not exist. Raises StoreError."""
    return _walk_local(store, folder) if store.local else _walk_bucket(store, folder)


def _walk_local(store: Store, folder: str) -> Iterator[tuple[str, list[Entry]]]:
    root = os.path.realpath(store.root)
    start = os.path.realpath(store.path(folder))
    stack = [(folder, start, [start] if folder else [])]  # with the targets of the links that were followed
    while stack:
        here, real, linked = stack.pop()
        entries: list[Entry] = []
        inner = []
        try:
            with os.scandir(store.path(here)) as found:
                items = sorted(found, key=lambda item: item.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            message = f"{store.path(here)} cannot be listed: {error.strerror}"
            yield here, [Entry(f"{here}/", problem=("unreadable folder", message))]
            continue
        for item in items:
            path = f"{here}/{item.name}" if here else item.name
            try:
                status = item.stat()
            except OSError as error:
                message = f"{store.path(path)} is a link that leads nowhere: {error.strerror}"
                entries.append(Entry(path, problem=("broken link", message)))
                continue
            if stat.S_ISREG(status.st_mode):
                entries.append(Entry(path, status.st_size))
            elif not stat.S_ISDIR(status.st_mode):
                message = f"{store.path(path)} is {special_file(status.st_mode) or 'no file'}"
                entries.append(Entry(path, problem=("special file", message)))
            elif hidden(item.name):
                entries.append(Entry(f"{path}/"))
            elif not item.is_symlink():
                inner.append((path, f"{real}/{item.name}", linked if here else []))
            else:
                target = os.path.realpath(item.path)
                why = _why_not(target, root, real, linked, top=not here)
                if why:
                    entries.append(Entry(f"{path}/", problem=("repeated link", f"{store.path(path)} leads {why}")))
                else:
                    linked.append(target)
                    inner.append((path, target, linked if here else [target]))
        yield here, entries
        stack += reversed(inner)


def _why_not(target: str, root: str, here: str, known: list[str], top: bool) -> str:
    """Why a link to a folder is not followed; empty if it is."""
    if _within(root, target) or _within(here, target):
        return "back to a folder above it: not followed"
    if os.path.dirname(target) == root if top else _within(target, root):
        return f"to {target}, which is read already"
    again = next((folder for folder in known if _within(target, folder)), None)
    return f"to {target}, which another link leads to" if again else ""


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _walk_bucket(store: Store, folder: str) -> Iterator[tuple[str, list[Entry]]]:
    """Keys come in an order that keeps the content of a folder together."""
    if not folder:
        files, inner = store.files_and_folders()
        yield "", [*(Entry(f"{name}/") for name in inner if hidden(name)), *(Entry(*file) for file in files.items())]
    begun: dict[str, list[Entry]] = {}
    skipped: set[str] = set()
    for key, size, tag in store.objects(folder):
        parts = key.split("/")
        if not folder and (len(parts) == 1 or hidden(parts[0])):
            continue  # already told
        cut = next((i for i, part in enumerate(parts) if hidden(part)), len(parts) - 1)
        here, name = "/".join(parts[:cut]), parts[cut]
        for done in [other for other in begun if not key.startswith(f"{other}/")]:
            yield done, begun.pop(done)
        entries = begun.setdefault(here, [])
        if cut < len(parts) - 1:
            name, size = f"{name}/", 0
        if name and (path := f"{here}/{name}" if here else name) not in skipped:
            entries.append(Entry(path, size, tag))
            if name.endswith("/"):
                skipped.add(path)
    yield from begun.items()
