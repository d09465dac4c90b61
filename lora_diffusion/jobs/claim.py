"""One driver at a time for an output: two that plan for different people would undo each other's work.

A driver makes `claim.json` in its output, only if nothing has that name, and counts up in it every BEAT seconds until it ends.
Who finds a claim takes it over at once if its process is known to be dead (on the same machine), or when it did not change for
STALE seconds; clocks are never compared. Of several who would take over, the one that makes the dead claim's heir does, a file
of a name that follows from the claim's content; it is gone when `claim.json` is the heir's. A driver that was away for so long
that another took over notices and stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_diffusion.jobs.watch import PATIENCE, said_after
from lora_diffusion.storage import Store, StoreError, open_store

FILE, HEIR = "claim.json", re.compile(r"claim-[0-9a-f]{16}\.json")
BEAT, STALE = 5.0, 60.0  # seconds
GRACE = 20.0  # seconds for a job to end


@contextmanager
def claimed(uri: str, job: str) -> Iterator[None]:
    """The output at `uri` is this process' alone inside of the block.

    Raises ValueError if another driver works on it, or took it over meanwhile; StoreError if it cannot be written.
    """
    claim = Claim(open_store(uri, read_seconds=10), job)
    claim.take()
    try:
        yield
    finally:
        claim.release()
        if claim.lost:
            raise ValueError(claim.lost) from None  # instead of the interruption that it began with


class Claim:
    """lost: the sentence about who took it over; empty while it is ours."""

    def __init__(self, store: Store, job: str) -> None:
        self.store, self.lost = store, ""
        self._mine: dict[str, Any] = {
            "job": job,
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self._made = [
            path for path in (Path(store.root), *Path(store.root).parents) if store.local and not path.exists()
        ]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        while not self.store.create(FILE, self._content()):
            if self._is_mine(self._read()) or self._take_over():
                break
        self._thread.start()

    def release(self) -> None:
        """Leave nothing behind, also no folder that was made for the claim alone."""
        self._over.set()
        self._thread.join(10)
        with suppress(StoreError):
            if self._is_mine(self._read()):
                self.store.delete(FILE)
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _take_over(self) -> bool:
        """False if the claim went meanwhile. Raises ValueError if its owner lives."""
        dead = self._claims()
        if not dead:
            return False
        if not is_dead(parsed(dead[-1])):
            print(
                f"{self.store.uri} is claimed by {owner(parsed(dead[-1]))}: waiting for a sign of life, and taking over after {STALE:g} s "
                "without",
                flush=True,
            )
            end = time.monotonic() + STALE
            while time.monotonic() < end and not is_dead(parsed(dead[-1])):
                time.sleep(min(1.0, BEAT))
                if self._claims() != dead:
                    return self._refuse()
        mine = heir(dead[-1])
        if not self.store.create(mine, self._content()) and not self._is_mine(self._read(mine)):
            return self._refuse()
        if self._read() != dead[0]:  # another took over and is done with it
            self.store.delete(mine)
            return self._refuse()
        self.store.write(FILE, self._content())
        for name in self.store.files():
            if HEIR.fullmatch(name):
                self.store.delete(name)
        print(f"{self.store.uri}: taken over from {owner(parsed(dead[-1]))}, which ended", flush=True)
        return True

    def _claims(self) -> list[bytes]:
        """What `claim.json` holds and, where its owner died, the heirs that died before it was theirs: the last one counts."""
        found, name = [], FILE
        while (data := self._read(name)) is not None:
            found.append(data)
            name = heir(data)
        return found

    def _refuse(self) -> bool:
        """False if there is no claim any more. Raises ValueError."""
        if not (there := self._claims()):
            return False
        raise ValueError(
            f"{owner(parsed(there[-1]))} works on {self.store.uri}. Wait until it is done, stop it, or choose another output"
        )

    def _keep(self) -> None:
        while not self._over.wait(BEAT):
            waiting = f"waiting for {self.store.uri}: no answer for {PATIENCE:g} s"
            with suppress(StoreError), said_after(PATIENCE, waiting):  # a store that is away for a while
                there = self._read()
                if there is not None and not self._is_mine(there):
                    self._stop(parsed(there))
                    return
                self._mine["beat"] += 1
                self.store.write(FILE, self._content())

    def _stop(self, there: dict[str, Any]) -> None:
        """End the job as Ctrl-C would; where that is ignored, or does not end it, the process."""
        self.lost = f"{owner(there)} took over {self.store.uri}, as nothing was heard of this one for {STALE:g} s"
        if callable(signal.getsignal(signal.SIGINT)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._over.wait(GRACE):
            print(self.lost, file=sys.stderr, flush=True)
            os._exit(1)

    def _content(self) -> bytes:
        return json.dumps(self._mine).encode()

    def _is_mine(self, there: bytes | None) -> bool:
        return there is not None and parsed(there).get("token") == self._mine["token"]

    def _read(self, name: str = FILE) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None


def heir(claim: bytes) -> str:
    """The name of the claim that succeeds this one."""
    return f"claim-{hashlib.sha256(claim).hexdigest()[:16]}.json"


def parsed(claim: bytes) -> dict[str, Any]:
    """Empty for what is none, or is being written."""
    try:
        found = json.loads(claim)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def owner(claim: dict[str, Any]) -> str:
    return f"the {claim.get('job', '?')} job of process {claim.get('pid', '?')} on {claim.get('host', '?')}"


def is_dead(claim: dict[str, Any]) -> bool:
    """Whether its process is known to have ended. False: it lives, or is one that cannot be seen from here."""
    if claim.get("machine") != machine() or type(claim.get("pid")) is not int:
        return False
    try:
        os.kill(claim["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def machine() -> str:
    """Whose process numbers mean the same: host, its start, and the container's own numbering."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
