"""Copies of people's data on a machine's disk: nobody else can read them, and none stays behind unless `data.cache` names a place."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lora_diffusion.places import local_place
from lora_diffusion.storage import lock, locked
from lora_diffusion.training.distributed import Group


@contextmanager
def cache_root(folder: str, group: Group | None = None) -> Iterator[Path]:
    """Where the workers of a machine put their caches: `folder`, or a new one that is removed at the end of the block.

    What was opened and mapped in the block can be read until its process ends. A new folder has a random name that rank 0
    draws; one whose maker was killed goes when the next is made.
    """
    if folder:
        yield local_place(folder, "data.cache")
        return
    group = group or Group()
    root = Path(tempfile.gettempdir()) / f"lora-diffusion-{os.getuid()}"
    path = root / f"{int(group.gather(np.array([secrets.randbits(62)], np.int64))[0][0]):016x}"
    if group.local_rank:
        yield path
        group.barrier()
        return
    with locked(private_folder(root)):
        for old in root.iterdir():
            _remove_unused(old)
        path.mkdir(0o700)
        held = lock(path)
    try:
        yield path
        group.barrier()
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def private_folder(path: Path) -> Path:
    """`path` as a folder that only this user can read, made if it is not there. Raises ValueError if it is somebody else's."""
    with suppress(FileExistsError):
        path.mkdir(0o700, parents=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        owner = "a link" if stat.S_ISLNK(found.st_mode) else f"user {found.st_uid}'s"
        raise ValueError(
            f"{path} is {owner}, not a folder of user {os.getuid()}: set data.cache to a folder of your own"
        )
    path.chmod(0o700)
    return path


@contextmanager
def private_files() -> Iterator[None]:
    """All files that this process makes in the block get mode 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _remove_unused(folder: Path) -> None:
    with suppress(OSError), locked(folder, fcntl.LOCK_NB):  # else its maker lives
        shutil.rmtree(folder, ignore_errors=True)
