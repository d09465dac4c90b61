"""A model's folder in a bucket, as a folder of this machine: fetched once, whole, and again when it has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lora_diffusion.places import check_name, local_place
from lora_diffusion.storage import open_store, partial_folder

_here_only: ContextVar[bool] = ContextVar("here_only", default=False)
CACHE_VARIABLE = "LORA_DIFFUSION_CACHE"
DEFAULT_CACHE = "~/.cache/lora-diffusion"


class NotHereError(ValueError):
    """What is wanted lies elsewhere, and must not be fetched now."""


@contextmanager
def here_only() -> Iterator[None]:
    """Inside, nothing is fetched: what is not on this machine raises NotHereError."""
    before = _here_only.set(True)
    try:
        yield
    finally:
        _here_only.reset(before)


def here_only_now() -> bool:
    return _here_only.get()


def fetch_folder(uri: str, wanted: Callable[[str], bool] = lambda name: True, threads: int = 8) -> Path:
    """The local folder (or file) that holds what lies at `uri`, for libraries that take only a path.

    A local `uri` is returned as it is. Of `s3://bucket/prefix` the files whose names are `wanted` are copied to the
    folder that LORA_DIFFUSION_CACHE names (or ~/.cache/lora-diffusion), under a name made of the address and all ETags:
    another content is another folder. Several processes may fetch the same at once. Raises ValueError if nothing lies
    there or it cannot be fetched.
    """
    store = open_store(uri)
    if store.local:
        return Path(store.root)
    try:
        found = store.filesystem.find(store.root, detail=True)
        file = store.root.rpartition("/")[2] if store.root in found else ""  # the address of one file
        paths = {path[len(store.root) + 1 :] or file: path for path in found if not path.endswith("/")}
        if not paths:
            raise ValueError("there are no files")
        paths = {name: path for name, path in paths.items() if wanted(name)}
        for name in paths:
            check_name(name)
        tags = sorted((name, found[path]["size"], found[path]["ETag"]) for name, path in paths.items())
        key = hashlib.sha256(json.dumps([store.uri, tags]).encode()).hexdigest()[:16]
        cache = local_place(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE, CACHE_VARIABLE)
        target = cache / key
        if target.is_dir():
            return target / file
        if here_only_now():
            raise NotHereError(f"{uri} is not on this machine yet: {len(paths)} files would be fetched")

        def fetch(name: str) -> None:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            store.filesystem.get_file(paths[name], str(path))

        with partial_folder(target) as partial:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fetch, paths))
            _move(partial, target)
        return target / file
    except NotHereError:
        raise
    except Exception as error:
        raise ValueError(f"cannot fetch {uri}: {error}") from error


def _move(partial: Path, target: Path) -> None:
    try:
        os.replace(partial, target)
    except OSError:
        if not target.is_dir():  # else another process was faster, with the same files
            raise
