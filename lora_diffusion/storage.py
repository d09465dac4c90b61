"""Where things lie: a folder of this machine or `s3://bucket/prefix`, behind the few operations that a corpus needs.

A write is whole or not at all, in both: locally a temporary name, fsync and rename; on S3 one PUT (or one completed
multipart upload). What a killed local writer left half-written goes with the next process' first write into the folder. S3's address and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, or a profile or instance role). Throttling answers (503 SlowDown, 500, 429) and
broken connections are tried again, with growing pauses, before they become an error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from lora_diffusion.extras import needs
from lora_diffusion.places import leads_out, place

_HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # what `_write_local` writes under, and nobody else
_swept: set[Path] = set()  # folders that this process has written into
_UPLOAD_BYTES = 2**26  # of one part of a large upload; S3 takes 10,000 parts
Buffer = bytes | memoryview
Item = TypeVar("Item")
Done = TypeVar("Done")
_ATTEMPTS = 8  # pauses double from 1 s to at most 20 s, times a random factor: about 40 s in all


class StoreError(OSError):
    """A store that cannot be read or written: nothing about one person, and nothing that another try would heal."""


class Store:
    """Files below one root. Names are relative, with `/`. Make it with `open_store`."""

    def __init__(self, uri: str, filesystem: Any, root: str, local: bool) -> None:
        self.uri = uri
        self.filesystem = filesystem
        self.root = root
        self.local = local

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def path(self, name: str) -> str:
        """The filesystem's own path of `name`, for libraries that take one (pyarrow, pandas). Raises ValueError for a name that
        leads out of a folder."""
        if self.local and (".." in name.split("/") or name.startswith("/") or "\0" in name):
            raise leads_out(name)
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes:
        """Whole content. Raises FileNotFoundError, also for a pipe, or StoreError for anything else."""
        return self._read(name)

    def read_part(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes from `start`, fewer at the end of the file. Raises as `read`."""
        if not count:
            return b""  # S3 refuses an empty range
        return self._read(name, start=start, end=start + count)

    def _read(self, name: str, **part: int) -> bytes:
        path = self.path(name)
        try:
            self._no_pipe(path)
            return bytes(self.filesystem.cat_file(path, **part))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{name} does not exist") from None
        except Exception as error:
            raise self._error("read", name, error) from error

    def read_json(self, name: str) -> Any:
        """Raises ValueError if it is no JSON, and as `read`."""
        data = self.read(name)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.uri}/{name} is not valid JSON: {error}") from error

    def read_many(self, names: Iterable[str], threads: int = 16) -> Iterator[bytes]:
        """Contents in the order of `names`, fetched side by side: at most two for each thread lie in memory."""
        yield from side_by_side(self.read, names, threads)

    def open(self, name: str) -> IO[bytes]:
        """A seekable stream: reads only the parts that are asked for (a Parquet footer, one column)."""
        if not self.local:
            return self.filesystem.open(self.path(name), "rb", block_size=2**20, cache_type="readahead")
        self._no_pipe(self.path(name))
        return open(self.path(name), "rb")

    def _no_pipe(self, path: str) -> None:
        if self.local and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise FileNotFoundError(f"{path} is a pipe or a device")  # reading it would wait for whoever writes

    def write(self, name: str, data: bytes) -> None:
        """Write or replace, whole or not at all. Raises StoreError."""
        try:
            if self.local:
                _write_local(Path(self.path(name)), [data])
            else:
                self.filesystem.pipe_file(self.path(name), data)
        except Exception as error:
            raise self._error("write", name, error) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file if nothing has this name; False, and nothing is done, if something has. Raises StoreError.

        Of several who try at once one succeeds, but in a store that knows no conditional writes.
        """
        path = self.path(name)
        try:
            if self.local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
            else:
                bucket, _, key = path.partition("/")
                self.filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        except Exception as error:
            answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if answer in (409, 412):
                return False
            if answer != 501 or self.exists(name):
                raise self._error("write", name, error) from error
            self.write(name, data)
        return True

    def write_parts(self, name: str, parts: Iterable[Buffer]) -> None:
        """As `write`, for content that is not to lie in memory whole: one part after the other."""
        try:
            if self.local:
                _write_local(Path(self.path(name)), parts)
            else:
                self._upload(name, parts)
        except Exception as error:
            raise self._error("write", name, error) from error

    def _upload(self, name: str, parts: Iterable[Buffer]) -> None:
        file = self.filesystem.open(self.path(name), "wb", block_size=_UPLOAD_BYTES)
        try:
            for part in parts:
                file.write(part)
        except BaseException:
            file.discard()
            file.closed = True  # or else closing would complete the upload
            raise
        file.close()

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str) -> None:
        """Remove; a file that is not there is no error."""
        try:
            self.filesystem.rm_file(self.path(name))
        except FileNotFoundError:
            pass
        except Exception as error:
            raise self._error("delete", name, error) from error

    def exists(self, name: str) -> bool:
        try:
            return bool(self.filesystem.exists(self.path(name)))
        except Exception as error:
            raise self._error("look for", name, error) from error

    def stamp(self, name: str) -> str:
        """Another one when the file is another: its size, and its ETag or when it was changed; "" if there is none. Raises StoreError."""
        try:
            info = self.filesystem.info(self.path(name), **({} if self.local else {"refresh": True}))
        except FileNotFoundError:
            return ""
        except Exception as error:
            raise self._error("look at", name, error) from error
        return f"{info['size']} {info.get('ETag') or info.get('mtime')}"

    def files(self, folder: str = "") -> dict[str, int]:
        """Name (without folder) -> bytes of the files directly in `folder`, no pipes or devices; none if it does not exist."""
        return self.files_and_folders(folder)[0]

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly in `folder`."""
        return self.files_and_folders(folder)[1]

    def files_and_folders(self, folder: str = "") -> tuple[dict[str, int], list[str]]:
        """`files` and `folders`, by one listing."""
        entries = self._list(folder)
        files = {
            entry["name"].rpartition("/")[2]: int(entry["size"] or 0)
            for entry in entries
            if entry["type"] not in ("directory", "other") and not entry["name"].endswith("/")
        }
        files = {name: size for name, size in files.items() if not _HALF_WRITTEN.fullmatch(name)}
        return files, sorted(e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory")

    def check(self) -> None:
        """That the place can be reached and, in a folder, written. Touches nothing. Raises StoreError."""
        try:
            if self.local:
                folder = next(path for path in (Path(self.root), *Path(self.root).parents) if path.exists())
                if not folder.is_dir():
                    raise NotADirectoryError
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(folder)
            else:
                bucket, _, prefix = self.root.partition("/")
                self.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except Exception as error:
            raise self._error("use", "", error) from error

    def objects(self, folder: str = "") -> Iterator[tuple[str, int, str]]:
        """Of a bucket: (name below the root, bytes, ETag) of everything below `folder`, page by page."""
        bucket, _, prefix = self.root.partition("/")
        prefix = f"{prefix}/" if prefix else ""
        request = {"Bucket": bucket, "Prefix": f"{prefix}{folder}/" if folder else prefix}
        while True:
            try:
                page = self.filesystem.call_s3("list_objects_v2", **request)
            except Exception as error:
                raise self._error("list", folder, error) from error
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(prefix), int(item["Size"]), item["ETag"]
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def sweep(self, folder: str) -> None:
        """Remove what killed local writers left half-written in `folder`, whether or not anything is written there again."""
        if self.local:
            _sweep(Path(self.path(folder)))

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            entries = self.filesystem.ls(
                self.path(folder).rstrip("/"), detail=True, **({} if self.local else {"refresh": True})
            )
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self._error("list", folder, error) from error
        # S3 lists a folder's own empty marker object among its content
        return [entry for entry in entries if entry["name"].rstrip("/") != self.path(folder).strip("/")]

    def _error(self, verb: str, name: str, error: Exception) -> StoreError:
        where = f"{self.uri}/{name}" if name else self.uri
        return StoreError(f"cannot {verb} {where}: {_reason(error, self.local)}")


def side_by_side(work: Callable[[Item], Done], items: Iterable[Item], threads: int = 16) -> Iterator[Done]:
    """`work` of each item, in their order, by threads. At most two answers for each thread wait, however slow the caller is."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Done]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) >= 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def open_store(uri: str | os.PathLike[str], attempts: int = _ATTEMPTS, read_seconds: float = 30) -> Store:
    """The store at `place(uri)`. Touches nothing yet. Raises ValueError.

    attempts: how often an S3 request is tried. read_seconds: how long one may wait for the next bytes.
    """
    from fsspec import filesystem  # here, so that the command line starts at once

    address = place(uri)
    if not address.startswith("s3://"):
        return Store(address, filesystem("file"), address, local=True)
    with needs("torch"):
        import s3fs  # noqa: F401
    root = address.removeprefix("s3://")
    s3 = filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "retries": {"max_attempts": attempts, "mode": "standard"},
            "connect_timeout": 5,
            "read_timeout": read_seconds,
        },
    )
    # botocore tries a request again; s3fs's own tries matter where a connection breaks while an answer is being read.
    s3.retries = min(4, attempts)
    return Store(address, s3, root, local=False)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left half-written; those that run hold a lock on their file."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if _HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, of this process and user alone, to be filled and renamed to `target`; gone at the end if it was not.

    With it go those of killed processes: they hold no lock any more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".*.tmp"):
        if _HALF_WRITTEN.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            with suppress(OSError), locked(left, fcntl.LOCK_NB):
                shutil.rmtree(left, ignore_errors=True)
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        partial.mkdir(0o700)
        mine = None
        with suppress(OSError):  # some network disks have no locks; and a sweep may have been faster
            mine = lock(partial)
        if partial.exists():
            break
        if mine is not None:
            os.close(mine)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if mine is not None:
            os.close(mine)


@contextmanager
def locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Inside, `folder` is this process'. Raises OSError if it cannot be."""
    descriptor = lock(folder, flags)
    try:
        yield
    finally:
        os.close(descriptor)


def lock(folder: Path, flags: int = 0) -> int:
    """A descriptor that holds the folder's lock until it is closed, at the latest by the end of the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _new_locked(path: Path) -> tuple[IO[bytes], Path]:
    """A new file beside `path`, locked until it is closed, so that no sweep takes it; another one if a sweep was faster."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        file = temporary.open("wb")
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file, temporary
        file.close()


def _write_local(path: Path, parts: Iterable[Buffer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:
        _sweep(path.parent)
        _swept.add(path.parent)
    file, temporary = _new_locked(path)
    try:
        with file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock goes
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _reason(error: Exception, local: bool) -> str:
    """What happened and the way out, in words of the user's world."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full. What is already written is safe: free some space and run the same command again"
    response = getattr(error.__cause__, "response", {})
    if response.get("Error", {}).get("Code") == "RequestTimeTooSkewed":
        return f"this machine's clock is not the store's ({error}). Set it, and run the same command again"
    if isinstance(error, PermissionError) or number in (errno.EACCES, errno.EROFS):
        way_out = "the folder's permissions" if local else "the credentials and what they may do with this bucket"
        return f"permission denied ({error}). Check {way_out}"
    if isinstance(error, NotADirectoryError | FileExistsError):  # the second: a folder of this name was to be made
        return "a part of this path is a file, not a folder. Choose another place"
    if isinstance(error, FileNotFoundError) and not local:
        return f"the bucket does not exist ({error}). Create it, or check the name and AWS_ENDPOINT_URL"
    if type(error).__name__ == "NoCredentialsError":
        return (
            "no S3 credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use an instance role"
        )
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"):
        return f"the store does not answer ({error}). Check AWS_ENDPOINT_URL and the network"
    return f"{type(error).__name__}: {error}"
