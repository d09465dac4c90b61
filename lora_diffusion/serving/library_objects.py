"""LoRAs in a folder or a bucket: one file of `kept` for each, which every gateway and decoder changes only as it has just read it.

A bucket must know conditional writes (If-Match, If-None-Match), as Amazon S3 does; a folder is locked, so its disk must know locks.
What has expired or was deleted leaves a note that says so, for as long again. One of the replicas sweeps every now and then;
what has no name of ours is left alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lora_diffusion.serving.config import LibraryConfig
from lora_diffusion.serving.errors import ServingError, store_unavailable
from lora_diffusion.serving.kept import DELETED, EXPIRED, Kept, from_bytes, put_on, to_bytes, unknown
from lora_diffusion.serving.messages import LoRARecord
from lora_diffusion.storage import Store, open_store

T = TypeVar("T")
Change = Callable[[Kept | None], Kept | None]
THREADS = 16  # requests to the store at a time, of each replica
TRIES = 50  # of a change that others are faster with
SWEEP_SECONDS = 600.0  # between two sweeps, at most
OURS = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}(\.[0-9a-f]{32})?")  # `_name` of `Owner.place`
HALF_WRITTEN = re.compile(r"[0-9a-f]{2}/\.[0-9a-f]{12}\.tmp")  # what a killed writer left in a folder
NOBODYS = '"00000000000000000000000000000000"'  # an ETag that no object has


class ObjectLibrary:
    """config.store: a folder, or s3://bucket/prefix."""

    def __init__(self, config: LibraryConfig) -> None:
        store = open_store(config.store, attempts=2, read_seconds=config.store_seconds)
        self.uri = store.uri
        self._files = _Folder(Path(store.root)) if store.local else _Bucket(store)
        self._seconds, self._ttl_seconds = config.store_seconds, config.ttl_seconds
        self._pool = ThreadPoolExecutor(
            THREADS, thread_name_prefix="library"
        )  # a store that hangs holds up nothing else
        self._sweeping: asyncio.Task[None] | None = None

    async def put(self, lora_id: str, record: LoRARecord, token: str = "") -> None:
        def change(before: Kept | None) -> Kept:
            now = time.time()
            return put_on(before, record, token, now + self._ttl_seconds, now)

        await self._ask(lambda: self._files.change(_name(lora_id), change, new=True))

    async def get(self, lora_id: str) -> LoRARecord:
        """Raises ServingError "unknown_lora", "store_unavailable"."""
        kept = await self._ask(lambda: self._files.read(_name(lora_id)))
        if kept is None:
            raise unknown()
        return kept.found(time.time())

    async def delete(self, lora_id: str, token: str = "") -> bool:
        """Whether there was one. Raises ServingError "not_yours", "store_unavailable"."""
        there = False

        def change(before: Kept | None) -> Kept | None:
            nonlocal there
            there = before is not None and before.record is not None and before.expires > time.time()
            if before is None or not there:
                return before
            return before.without(token) or Kept(None, time.time() + self._ttl_seconds, gone=DELETED)

        await self._ask(lambda: self._files.change(_name(lora_id), change))
        return there

    async def stats(self) -> dict[str, Any]:
        return {}

    async def ready(self) -> bool:
        """Raises ServingError "store_unavailable"."""
        await self._ask(self._files.check)
        return True

    async def _ask(self, work: Callable[[], T]) -> T:
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep_on())
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except ServingError:
            raise
        except Exception as error:
            raise store_unavailable(error) from error

    async def _sweep_on(self) -> None:
        pause = min(SWEEP_SECONDS, self._ttl_seconds / 2)
        while True:
            await asyncio.sleep(pause)
            with suppress(Exception):  # what could not be swept is met by the next one
                await asyncio.to_thread(self.sweep, pause)

    def sweep(self, pause: float = 0.0) -> None:
        """Notes in the place of what has expired, and nothing in that of old notes; unless somebody did so `pause` seconds ago."""
        ours = False

        def claim(before: Kept | None) -> Kept | None:
            nonlocal ours
            now = time.time()
            ours = before is None or before.expires <= now
            return Kept(None, now + pause, gone="the next sweep") if ours else before

        def change(before: Kept | None) -> Kept | None:
            now = time.time()
            if before is None or before.expires > now:
                return before
            return None if before.gone else Kept(None, before.expires + self._ttl_seconds, gone=EXPIRED)

        self._files.change(".sweep", claim)
        for name in self._files.older_than(self._ttl_seconds) if ours else ():
            self._files.change(name, change)


class _Folder:
    """Files of this user alone, each below the first two digits of its name. A lock for each of these folders."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> Kept | None:
        with suppress(FileNotFoundError):
            return _kept((self._root / name).read_bytes())
        return None

    def change(self, name: str, change: Change, new: bool = False) -> None:
        path = self._root / name
        with self._locked(path.parent):
            before = self.read(name)
            after = change(before)
            if after is None:
                path.unlink(missing_ok=True)
            elif after is not before:
                temporary = path.with_name(
                    f".{secrets.token_hex(6)}.tmp"
                )  # no fsync: whole or not at all if we are killed
                with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                    file.write(to_bytes(after))
                os.replace(temporary, path)

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def check(self) -> None:
        with self._locked(self._root):
            pass

    def older_than(self, seconds: float) -> Iterator[str]:
        for path in self._root.glob("??/*"):
            name = path.relative_to(self._root).as_posix()
            with suppress(FileNotFoundError):
                if (
                    OURS.fullmatch(name) or HALF_WRITTEN.fullmatch(name)
                ) and path.stat().st_mtime <= time.time() - seconds:
                    yield name


class _Bucket:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._bucket, _, prefix = store.root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def read(self, name: str) -> Kept | None:
        return self._read(name)[0]

    def _read(self, name: str) -> tuple[Kept | None, str]:
        """And its ETag, "" if there is none."""
        from fsspec.asyn import sync

        s3 = self._store.filesystem

        async def fetch() -> tuple[bytes, str]:
            answer = await s3._call_s3("get_object", Bucket=self._bucket, Key=self._prefix + name)
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        try:
            data, version = sync(s3.loop, fetch)
        except FileNotFoundError:
            return None, ""
        return _kept(data), version

    def change(self, name: str, change: Change, new: bool = False) -> None:
        """new: most likely nothing is there, so that one request is enough."""
        before, version = (None, "") if new else self._read(name)
        for attempt in range(TRIES):
            after = change(before)
            if after is before or self._write(name, after, version):
                return
            time.sleep(secrets.randbelow(2 ** min(attempt, 6)) / 1000)  # not all of them again at once
            before, version = self._read(name)
        raise OSError("too many change the same LoRA at once")

    def _write(self, name: str, after: Kept | None, version: str) -> bool:
        """False if it is not the `version` any more."""
        where = {"Bucket": self._bucket, "Key": self._prefix + name}
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        try:
            if after is None:
                self._store.filesystem.call_s3("delete_object", **where, **condition)
            else:
                self._store.filesystem.call_s3("put_object", **where, **condition, Body=to_bytes(after))
        except Exception as error:
            if isinstance(error, FileNotFoundError) or _status(error) in (409, 412):
                return False
            raise
        return True

    def check(self) -> None:
        """That it answers, may be written, and knows conditions: a write that must be refused."""
        try:
            self._store.filesystem.call_s3(
                "put_object", Bucket=self._bucket, Key=f"{self._prefix}.check", Body=b"", IfMatch=NOBODYS
            )
        except Exception as error:
            if _status(error) in (404, 412) and _code(error) != "NoSuchBucket":
                return
            raise
        raise OSError("this bucket does not know conditional writes (If-Match)")

    def older_than(self, seconds: float) -> Iterator[str]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix}
        while True:
            page = self._store.filesystem.call_s3("list_objects_v2", **request)
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(self._prefix)
                if (
                    OURS.fullmatch(name) and item["LastModified"].timestamp() <= time.time() - seconds + 1
                ):  # whole seconds
                    yield name
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]


def _name(lora_id: str) -> str:
    return f"{lora_id[:2]}/{lora_id}"


def _kept(data: bytes) -> Kept:
    """What is damaged or of another version is gone: it is made again, and then replaced."""
    try:
        return from_bytes(data)
    except ValueError:
        return Kept(None, 0.0, gone="cannot be read in the store")


def _status(error: BaseException) -> int:
    answer: dict[str, Any] = getattr(error.__cause__, "response", {})
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: BaseException) -> str:
    answer: dict[str, Any] = getattr(error.__cause__, "response", {})
    return str(answer.get("Error", {}).get("Code", ""))
