"""One driver at a time for an output: the second is refused, a dead one's place is taken, one that was away stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_faults import faulty
from s3_server import S3Server

from lora_diffusion.jobs import claim
from lora_diffusion.jobs.claim import Claim, claimed
from lora_diffusion.storage import Store, open_store

DRIVER = """
import sys, time
from lora_diffusion.jobs.claim import claimed
with claimed(sys.argv[1], "corpus"):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.2, "STALE": 1.5}.items():
        monkeypatch.setattr(claim, name, seconds)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "some" / "corpus")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/corpus")


@pytest.fixture
def driver(store: Store) -> Callable[[], subprocess.Popen[bytes]]:
    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", DRIVER, store.uri], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        return process

    return start


def test_nothing_is_written_where_something_is(store: Store) -> None:
    assert store.create("x", b"one")
    assert not store.create("x", b"two")
    assert store.read("x") == b"one"


def dead(pid: int = 2**22 + 1) -> bytes:
    """The claim of a process that is none."""
    return json.dumps({"job": "corpus", "host": "here", "machine": claim.machine(), "pid": pid}).encode()


@pytest.mark.parametrize("before", ["nothing", "a dead claim", "one whose heir died, too"])
def test_of_many_at_once_one_gets_it(store: Store, before: str) -> None:
    for _ in range(2):
        if before != "nothing":
            store.write(claim.FILE, dead())
        if before == "one whose heir died, too":
            store.write(claim.heir(dead()), dead(2**22 + 2))
        outcomes: list[Claim | str] = []
        start = threading.Barrier(6)

        def take(outcomes: list[Claim | str] = outcomes, start: threading.Barrier = start) -> None:
            mine = Claim(open_store(store.uri), "corpus")
            start.wait()
            try:
                mine.take()
                outcomes.append(mine)
            except ValueError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [found for found in outcomes if isinstance(found, Claim)]
        assert len(winners) == 1, outcomes
        assert all("works on" in str(found) for found in outcomes if found is not winners[0])
        assert not winners[0].lost
        winners[0].release()
        assert store.files() == {}


class Held(Store):
    """A store in which one step of a take-over, the first on this name, waits until `others` have been there."""

    others: Callable[[], None] | None = None

    def __init__(self, store: Store, step: str, name: str) -> None:
        super().__init__(store.uri, store.filesystem, store.root, store.local)
        act = getattr(self, step)

        def slow(asked: str, content: bytes) -> object:
            if asked == name and (others := self.others):
                self.others = None
                others()
            return act(asked, content)

        setattr(self, step, slow)


@pytest.mark.parametrize("done", [True, False])
def test_who_is_slow_to_take_over_takes_nothing_from_who_did(store: Store, done: bool) -> None:
    store.write(claim.FILE, dead())
    slow, quick = Held(store, "create", claim.heir(dead())), Claim(open_store(store.uri), "corpus")
    mine = Claim(slow, "corpus")

    def others() -> None:
        quick.take()
        if done:
            quick.release()

    slow.others = others
    if done:
        mine.take()
        mine.release()
    else:
        with pytest.raises(ValueError, match="works on"):
            mine.take()
        assert not quick.lost
        quick.release()
    assert store.files() == {}


def test_nobody_else_takes_over_what_has_an_heir(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "STALE", 60.0)
    store.write(claim.FILE, dead())
    slow = Held(store, "write", claim.FILE)
    mine, refused = Claim(slow, "corpus"), []

    def other() -> None:
        try:
            Claim(open_store(store.uri), "corpus").take()
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=other)

    def others() -> None:
        thread.start()
        time.sleep(1)

    slow.others = others
    mine.take()
    thread.join()
    assert "works on" in refused[0]
    assert not mine.lost
    mine.release()
    assert store.files() == {}


def test_a_second_driver_is_refused_and_a_killed_ones_place_is_taken_at_once(
    store: Store, driver: Callable[[], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "STALE", 60.0)
    with driver() as first:
        found = store.read(claim.FILE)
        with (
            pytest.raises(ValueError, match=rf"the corpus job of process {first.pid} on .* works on .* choose another"),
            claimed(store.uri, "corpus"),
        ):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert json.loads(store.read(claim.FILE))["token"] == json.loads(found)["token"]
    begin = time.monotonic()
    with claimed(store.uri, "corpus"):
        assert json.loads(store.read(claim.FILE))["pid"] == os.getpid()
    assert time.monotonic() - begin < 20
    assert not store.exists(claim.FILE)


def test_a_driver_of_another_machine_is_waited_for_and_its_place_taken_when_it_is_silent(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_json(claim.FILE, {"job": "corpus", "host": "gpu-7", "machine": "elsewhere", "pid": 17, "beat": 3})
    begin = time.monotonic()
    with claimed(store.uri, "corpus"):
        assert time.monotonic() - begin >= 1.5
    said = capsys.readouterr().out
    assert (
        "is claimed by the corpus job of process 17 on gpu-7: waiting for a sign of life, and taking over after 1.5 s"
        in said
    )
    assert "taken over from the corpus job of process 17 on gpu-7, which ended" in said
    for nothing in (b"", b'[{"pid": 1}]'):
        store.write(claim.FILE, nothing)
        with claimed(store.uri, "corpus"):
            pass


def test_a_driver_that_was_taken_over_while_it_was_away_stops(store: Store, request: pytest.FixtureRequest) -> None:
    def other() -> None:
        time.sleep(0.5)
        store.write_json(
            claim.FILE, {"job": "corpus", "host": "gpu-7", "machine": "elsewhere", "pid": 17, "token": "x"}
        )

    threading.Thread(target=other).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    begin = time.monotonic()
    took_over = "the corpus job of process 17 on gpu-7 took over"
    with pytest.raises(ValueError, match=took_over), claimed(store.uri, "corpus"):
        time.sleep(60)
    assert time.monotonic() - begin < 30
    assert json.loads(store.read(claim.FILE))["pid"] == 17, "the other's claim stays"


def test_nothing_is_left_but_what_the_job_wrote(tmp_path: Path) -> None:
    with claimed(str(tmp_path / "a" / "b"), "corpus"):
        assert os.listdir(tmp_path / "a" / "b") == [claim.FILE]
    assert os.listdir(tmp_path) == []
    with claimed(str(tmp_path / "a" / "b"), "corpus"):
        open_store(tmp_path / "a" / "b").write("x", b"")
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "x"]


@pytest.mark.s3
def test_a_store_that_falls_silent_under_a_job_is_named(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.3)
    with faulty(s3.endpoint, hung=0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with claimed(f"s3://{bucket}/corpus", "corpus"):
            proxy.shares["hung"] = 1.0
            said = ""
            while "waiting for" not in said:  # the test's own time limit ends this
                time.sleep(0.1)
                said += capsys.readouterr().out
            proxy.shares["hung"] = 0.0
    assert f"waiting for s3://{bucket}/corpus: no answer for 0.3 s" in said


def test_a_process_of_another_user_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be asked, and its place must not be taken at once."""

    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    assert claim.is_dead(json.loads(dead()))
    monkeypatch.setattr(os, "kill", kill)
    assert not claim.is_dead(json.loads(dead()))


def test_a_process_number_of_another_container_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers of one host may have one name; what is no process here may be one there."""
    there = json.loads(dead())
    assert claim.is_dead(there)
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert not claim.is_dead(there)
