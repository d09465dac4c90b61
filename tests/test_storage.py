"""Laws of the store: a write is whole or not at all, faults are tried again, and every error names the way out."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_faults import faulty
from s3_server import S3Server

from lora_diffusion.storage import Store, StoreError, open_store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "out")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


def test_what_is_written_is_read_listed_and_deleted(store: Store) -> None:
    assert store.files("shards") == {}
    assert store.folders() == []
    store.write("shards/00000.parquet", b"abc")
    store.write("shards/ü 😀.bin", b"")
    store.write_json("corpus.json", {"b": 1, "a": ["ü"]})
    assert store.read("shards/00000.parquet") == b"abc"
    assert store.read_json("corpus.json") == {"b": 1, "a": ["ü"]}
    assert store.files("shards") == {"00000.parquet": 3, "ü 😀.bin": 0}
    assert store.files() == {"corpus.json": len(store.read("corpus.json"))}
    assert store.folders() == ["shards"]
    store.write("shards/00000.parquet", b"again")
    with store.open("shards/00000.parquet") as file:
        file.seek(1)
        assert file.read() == b"gain"
    store.delete("shards/00000.parquet")
    store.delete("shards/00000.parquet")
    assert not store.exists("shards/00000.parquet")
    assert list(store.read_many(["corpus.json"] * 3)) == [store.read("corpus.json")] * 3
    with pytest.raises(FileNotFoundError, match="shards/00000"):
        store.read("shards/00000.parquet")


def test_a_killed_local_writer_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    """A process that writes without pause is killed at fifteen moments; the file is always one whole version."""
    script = (
        "import sys, itertools; from lora_diffusion.storage import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "for i in itertools.count(): store.write('x', bytes([i % 251]) * 3_000_000)"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as writer:
        deadline = time.monotonic() + 60
        while not (tmp_path / "x").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(15):
            content = (tmp_path / "x").read_bytes()
            assert len(content) == 3_000_000
            assert len(set(content)) == 1
            seen.add(content[0])
            time.sleep(0.01)
        writer.kill()
    assert len(seen) > 1, "the writer did not write while it was watched"
    assert len(set((tmp_path / "x").read_bytes())) == 1
    store = open_store(tmp_path)
    (tmp_path / ".x.0123456789ab.tmp").write_bytes(b"left behind")
    assert set(store.files()) == {"x"}
    store.sweep("")
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_writer_left_goes_with_the_next_process_first_write(tmp_path: Path) -> None:
    """In every folder, of every job: a driver killed while it wrote a score left half of it for ever."""
    program = """
import os, signal, sys
from lora_diffusion.storage import open_store

def parts():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)

open_store(sys.argv[1]).write_parts("scores/x", parts())
"""
    dead = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "scores")) == 1
    open_store(tmp_path).write("scores/y", b"whole")
    assert os.listdir(tmp_path / "scores") == ["y"]


def test_no_writer_loses_its_file_to_anothers_first_write(tmp_path: Path) -> None:
    """Between a file's making and its lock, or its lock's end and its rename, another process' sweep took it."""
    program = """
import sys
from lora_diffusion import storage

for i in range(400):
    storage._swept.clear()
    storage.open_store(sys.argv[1]).write(sys.argv[2], b"x" * 1000)
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in ("a", "b", "c")]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_sweep_removes_what_killed_writers_left_and_nothing_of_others(tmp_path: Path) -> None:
    others = ["notes.tmp", ".x.tmp", ".x.123.tmp", ".x.0123456789AB.tmp", "x.0123456789ab.tmp", ".x.0123456789ab.tmp~"]
    for name in [*others, ".x.0123456789ab.tmp"]:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".folder.0123456789ab.tmp").mkdir()
    store, running = open_store(tmp_path), []

    def parts() -> Iterator[bytes]:
        yield b"one"
        open_store(tmp_path).sweep("")  # another process' sweep, while this writer runs
        running.extend(tmp_path.glob(".y.*.tmp"))
        yield b"two"

    store.write_parts("y", parts())
    assert len(running) == 1
    assert store.read("y") == b"onetwo"
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".folder.0123456789ab.tmp", "y"])
    assert set(store.files()) == {*others, "y"}


def test_wrong_addresses_are_user_errors() -> None:
    with pytest.raises(ValueError, match="local folder or s3://bucket/prefix"):
        open_store("gs://bucket/x")
    with pytest.raises(ValueError, match="needs a bucket"):
        open_store("s3:///")


def test_a_full_disk_is_named_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk's end: the kernel refuses the write in the middle, as it does with ENOSPC."""
    script = (
        "import resource, signal, sys; from lora_diffusion.storage import open_store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "open_store(sys.argv[1]).write('small', b'x' * 1000)\n"
        "open_store(sys.argv[1]).write('large', b'x' * 1_000_000)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "StoreError: cannot write" in done.stderr
    assert "the disk is full" in done.stderr
    assert os.listdir(tmp_path) == ["small"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file/x"):
        open_store(tmp_path / "file").write("x", b"")
    if os.geteuid() != 0:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(StoreError, match="permission denied"):
            open_store(tmp_path).write("x", b"")


@pytest.fixture
def endpoint(s3: S3Server) -> Iterator[None]:
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.mark.s3
def test_an_unwritable_bucket_bad_credentials_and_a_wrong_address_are_named(
    s3: S3Server, endpoint: None, bucket: str
) -> None:
    os.environ.update(s3.reader_env)
    with pytest.raises(
        StoreError, match=rf"cannot write s3://{bucket}/x/y: permission denied .* Check the credentials"
    ):
        open_store(f"s3://{bucket}/x", attempts=2).write("y", b"")
    assert open_store(f"s3://{bucket}/x", attempts=2).files() == {}
    os.environ["AWS_SECRET_ACCESS_KEY"] = "wrong"
    with pytest.raises(StoreError, match="Check the credentials"):
        open_store(f"s3://{bucket}/x", attempts=2).files()
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    with pytest.raises(StoreError, match="Could not connect to the endpoint"):
        open_store(f"s3://{bucket}/x", attempts=2).write("x", b"")


@pytest.mark.s3
def test_throttling_and_broken_connections_are_tried_again(s3: S3Server, endpoint: None, bucket: str) -> None:
    with faulty(s3.endpoint, seed=1, throttled=0.15, refused=0.1, cut=0.1) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        store = open_store(f"s3://{bucket}/faulty")
        contents = {f"{i:02d}": bytes([i]) * 200_000 for i in range(12)}
        for name, content in contents.items():
            store.write(name, content)
        assert set(store.files()) == set(contents)
        assert {name: store.read(name) for name in contents} == contents
    assert min(proxy.counts.values()) > 0, f"every kind of fault must have happened: {proxy.counts}"


def test_many_files_are_read_ahead_but_never_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of 65,000 people has 10 GB of statistics; who merges them is slower than who reads."""
    store = open_store(tmp_path)
    names = [f"{i:03d}" for i in range(100)]
    for name in names:
        store.write(name, name.encode())
    started: list[str] = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda name: started.append(name) or read(name))  # type: ignore[func-returns-value]
    contents = store.read_many(names, threads=4)
    assert next(contents) == b"000"
    assert len(started) <= 8
    assert [b"000", *contents] == [name.encode() for name in names]
