"""One behaviour of all libraries: in memory, in a Redis, in a folder, in a bucket; each a real one."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis_server import RedisServer, with_tls

from lora_diffusion.config import from_dict
from lora_diffusion.serving.config import LibraryConfig, ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.kept import Kept, from_bytes, to_bytes
from lora_diffusion.serving.library import ShardedLibrary, open_library
from lora_diffusion.serving.messages import Code, LoRARecord
from lora_diffusion.storage import open_store

TTL = 3.0  # seconds; for as long again it is known what has expired. Long enough for a busy machine
CODE = Code(np.linspace(-1, 1, 16, dtype=np.float32), "0" * 16, nearest=0.5)
MADE = LoRARecord(CODE, 0.5)
UPLOADED = LoRARecord(vector_N=np.arange(10, dtype=np.float32))
STORES = ["memory", "shards", "redis", "folder", pytest.param("s3", marks=pytest.mark.s3)]
OUTSIDE = STORES[2:]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> LibraryConfig:
    store = {
        "memory": lambda: "",
        "shards": lambda: "",
        "redis": lambda: request.getfixturevalue("redis").url,
        "folder": lambda: str(tmp_path / "store"),
        "s3": lambda: f"s3://{request.getfixturevalue('bucket')}",
    }[request.param]()
    return LibraryConfig(store=store, ttl_seconds=60, store_seconds=20)


def opened(config: LibraryConfig, **changes: Any) -> Any:
    from dataclasses import replace

    return open_library(ServeConfig(library=replace(config, **changes)))


@pytest.fixture
def library(request: pytest.FixtureRequest, config: LibraryConfig) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        if "shards" in request.node.callspec.id:
            return ShardedLibrary([opened(config, **changes) for _ in range(3)])
        return opened(config, **changes)

    return make


everywhere = pytest.mark.parametrize("config", STORES, indirect=True)
outside = pytest.mark.parametrize("config", OUTSIDE, indirect=True)


def new_id() -> str:
    return secrets.token_hex(16)


def same(a: LoRARecord, b: LoRARecord) -> bool:
    def plain(record: LoRARecord) -> Any:
        code = record.code and (record.code.values_Z.tolist(), record.code.model_id, record.code.nearest)
        return code, record.deviation_scale, None if record.vector_N is None else record.vector_N.tolist()

    return bool(plain(a) == plain(b))


async def refusal(call: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(ServingError) as caught:
        await call
    return caught.value.reason, str(caught.value)


@everywhere
def test_what_was_put_is_got_until_it_is_deleted(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        held, lora_id = library(), new_id()
        for record in (MADE, UPLOADED):
            place = f"{lora_id}.{record.nbytes}"  # as an API key's
            await held.put(place, record)
            kept = await held.get(place)
            assert same(kept, record)
            assert 50 < kept.expires_in <= 60
            assert await held.delete(place)
            assert await refusal(held.get(place)) == ("unknown_lora", "This LoRA was deleted. Make it again.")
            assert not await held.delete(place)
            await held.put(place, record)
            assert same(await held.get(place), record)
        assert await held.ready()

    asyncio.run(scene())


@everywhere
def test_it_is_never_replaced_by_less(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        held = library()
        for first, second in ((MADE, UPLOADED), (UPLOADED, MADE)):
            lora_id = new_id()
            await held.put(lora_id, first)
            await held.put(lora_id, second)
            assert same(await held.get(lora_id), LoRARecord(CODE, 0.5, UPLOADED.vector_N))

    asyncio.run(scene())


@everywhere
def test_it_stays_until_all_who_made_it_have_deleted_it(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        held, lora_id = library(), new_id()
        for token in ("ada", "bob", "ada"):
            await held.put(lora_id, MADE, token)
        for token in ("eve", ""):
            assert (await refusal(held.delete(lora_id, token)))[0] == "not_yours"
        assert await held.delete(lora_id, "bob")
        assert (await refusal(held.delete(lora_id, "bob")))[0] == "not_yours"
        assert same(await held.get(lora_id), MADE)
        assert await held.delete(lora_id, "ada")
        assert "was deleted" in (await refusal(held.get(lora_id)))[1]

    asyncio.run(scene())


@everywhere
def test_it_expires_and_says_so_and_putting_again_renews_it(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        held, kept, renewed, never = library(ttl_seconds=TTL), new_id(), new_id(), new_id()
        await held.ready()
        await held.put(kept, MADE, "ada")
        await held.put(renewed, MADE)
        await asyncio.sleep(0.6 * TTL)
        await held.put(renewed, MADE)
        await asyncio.sleep(0.5 * TTL)
        assert same(await held.get(renewed), MADE)
        assert await refusal(held.get(kept)) == ("unknown_lora", "This LoRA has expired. Make it again.")
        assert "There is no LoRA with this id here." in (await refusal(held.get(never)))[1]
        await held.put(kept, MADE, "bob")
        assert await held.delete(kept, "bob")  # who made it before it expired has no part in it any more

    asyncio.run(scene())


@outside
def test_replicas_share_it_and_a_new_one_finds_all(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        lora_id = new_id()
        await library().put(lora_id, MADE, "ada")
        other = library()
        assert same(await other.get(lora_id), MADE)
        assert (await refusal(other.delete(lora_id, "bob")))[0] == "not_yours"
        assert await other.delete(lora_id, "ada")
        assert "was deleted" in (await refusal(library().get(lora_id)))[1]

    asyncio.run(scene())


@outside
def test_many_at_once_lose_nothing_and_leave_what_the_laws_say(library: Callable[..., Any]) -> None:
    """Sixteen makers and one uploader through four replicas; then all but one delete it, then the last."""
    makers = [f"maker {i}" for i in range(16)]

    async def scene() -> None:
        replicas, lora_id = [library() for _ in range(4)], new_id()
        puts = [replicas[i % 4].put(lora_id, MADE, token) for i, token in enumerate(makers)]
        await asyncio.gather(*puts, replicas[0].put(lora_id, UPLOADED))
        assert same(await replicas[1].get(lora_id), LoRARecord(CODE, 0.5, UPLOADED.vector_N))
        gone = await asyncio.gather(*(replicas[i % 4].delete(lora_id, token) for i, token in enumerate(makers[1:])))
        assert all(gone)
        assert same(await replicas[2].get(lora_id), LoRARecord(CODE, 0.5, UPLOADED.vector_N))
        ends = await asyncio.gather(*(one.delete(lora_id, makers[0]) for one in replicas), return_exceptions=True)
        assert ends.count(True) == 1  # of those who delete the same, one does
        assert "was deleted" in (await refusal(replicas[3].get(lora_id)))[1]

    asyncio.run(scene())


@outside
def test_who_puts_it_while_others_delete_it_has_it(library: Callable[..., Any]) -> None:
    """Whatever the order of a deletion and a making, the one who made it and has not deleted it finds it."""

    async def scene() -> None:
        replicas = [library() for _ in range(2)]

        async def once() -> None:
            lora_id = new_id()
            await replicas[0].put(lora_id, MADE, "ada")
            await asyncio.gather(replicas[0].delete(lora_id, "ada"), replicas[1].put(lora_id, MADE, "bob"))
            assert same(await replicas[0].get(lora_id), MADE)
            assert (await refusal(replicas[0].delete(lora_id, "ada")))[0] == "not_yours"
            assert await replicas[0].delete(lora_id, "bob")

        for _ in range(5):
            await asyncio.gather(*(once() for _ in range(6)))

    asyncio.run(scene())


@pytest.mark.parametrize("config", ["folder", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_what_has_expired_leaves_the_store_although_nobody_asks(library: Callable[..., Any]) -> None:
    async def scene() -> None:
        held, lora_id = library(ttl_seconds=1.0), new_id()
        await held.put(lora_id, MADE)
        files, name = held._files, f"{lora_id[:2]}/{lora_id}"
        deadline = time.monotonic() + 20
        while files.read(name) and files.read(name).record and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert files.read(name) is None or files.read(name).gone == "has expired"
        while files.read(name) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert files.read(name) is None  # not even the note

    asyncio.run(scene())


@pytest.mark.parametrize("config", ["folder", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_what_others_keep_in_the_same_place_stays(library: Callable[..., Any]) -> None:
    """A corpus in the bucket that library.store names was deleted as if it had expired."""
    lora_id = new_id()
    other = f"{new_id()}.0123"
    theirs = ["corpus/shards/00000.parquet", "v1/notes.txt", "corpus.json", f"{other[:2]}/{other}", f"00/{'1' * 32}"]

    async def scene() -> None:
        held = library(ttl_seconds=1.0)
        await held.put(lora_id, MADE)
        await held.put(f"{lora_id}.{'f' * 32}", MADE)  # an API key's
        store = open_store(held.uri)
        for name in theirs:
            store.write(name, b"not a record of ours")
        left = dict.fromkeys(theirs, False)
        for _ in range(2):  # the first leaves a note
            await asyncio.sleep(2.5)
            held.sweep()
            left = {name: store.exists(name) for name in theirs}
        assert left == dict.fromkeys(theirs, True)
        assert held._files.read(f"{lora_id[:2]}/{lora_id}") is None
        assert held._files.read(f"{lora_id[:2]}/{lora_id}.{'f' * 32}") is None

    asyncio.run(scene())


def test_redis_itself_removes_it(redis: RedisServer) -> None:
    async def scene() -> None:
        held, lora_id = opened(LibraryConfig(store=redis.url, ttl_seconds=0.3)), new_id()
        await held.put(lora_id, MADE, "ada")
        keys = await held._redis.keys(f"*{lora_id}*")
        assert len(keys) == 2
        assert all([0 < await held._redis.pttl(key) <= 600 for key in keys])
        await asyncio.sleep(0.7)
        assert not await held._redis.keys(f"*{lora_id}*")

    asyncio.run(scene())


def test_the_bytes_are_safe_and_damage_is_noticed() -> None:
    kept = Kept(LoRARecord(CODE, None, UPLOADED.vector_N), 12.25, ("a" * 32, "b" * 32))
    data = to_bytes(kept)
    again = from_bytes(data)
    assert again.record is not None
    assert kept.record is not None
    assert same(again.record, kept.record)
    assert (again.expires, again.tokens, again.gone) == (12.25, kept.tokens, "")
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        with pytest.raises(ValueError, match="no record of ours"):
            from_bytes(bytes(damaged))
    for cut in (0, 7, 100, len(data) - 1):
        with pytest.raises(ValueError, match="no record of ours"):
            from_bytes(data[:cut])


@outside
def test_what_is_damaged_in_the_store_is_made_again(library: Callable[..., Any], config: LibraryConfig) -> None:
    async def scene() -> None:
        held, lora_id = library(), new_id()
        await held.put(lora_id, MADE)
        if config.store.startswith("redis"):
            await held._redis.hset(f"lora-diffusion:{lora_id}", "code", b"nonsense")
        elif config.store.startswith("s3"):
            held._files._store.write(f"{lora_id[:2]}/{lora_id}", b"nonsense")
        else:
            Path(config.store, lora_id[:2], lora_id).write_bytes(b"nonsense")
        reason, told = await refusal(held.get(lora_id))
        assert (reason, told) == ("unknown_lora", "This LoRA cannot be read in the store. Make it again.")
        await held.put(lora_id, MADE)
        assert same(await held.get(lora_id), MADE)

    asyncio.run(scene())


def test_a_password_stays_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    server = RedisServer(tmp_path, "--requirepass", "geheim")
    server.start()
    try:
        with pytest.raises(ValueError, match="LORA_DIFFUSION_REDIS_PASSWORD") as caught:
            from_dict(ServeConfig, {"library": {"store": f"redis://:geheim@127.0.0.1:{server.port}"}})
        assert "geheim" not in str(caught.value)
        config = LibraryConfig(store=server.url)
        assert asyncio.run(refusal(opened(config).get(new_id())))[0] == "store_unavailable"
        monkeypatch.setenv("LORA_DIFFUSION_REDIS_PASSWORD", "falsch")
        assert asyncio.run(refusal(opened(config).ready()))[0] == "store_unavailable"
        assert "falsch" not in caplog.text
        monkeypatch.setenv("LORA_DIFFUSION_REDIS_PASSWORD", "geheim")
        assert asyncio.run(opened(config).ready())
    finally:
        server.kill()


def test_tls_is_spoken_and_a_certificate_that_nobody_knows_is_refused(redis: RedisServer, tmp_path: Path) -> None:
    async def scene() -> None:
        async with with_tls(redis.port, tmp_path) as (port, certificate):
            url, lora_id = f"rediss://127.0.0.1:{port}/0", new_id()
            held = opened(LibraryConfig(store=f"{url}?ssl_ca_certs={certificate}"))
            await held.put(lora_id, MADE)
            assert same(await held.get(lora_id), MADE)
            stranger = opened(LibraryConfig(store=url))
            assert (await refusal(stranger.get(lora_id)))[0] == "store_unavailable"
            for each in (held, stranger):
                await each._redis.aclose()

    asyncio.run(scene())


def test_a_store_that_is_down_hangs_or_is_full_is_told_in_time_and_heals(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()

    async def scene() -> None:
        held, lora_id = opened(LibraryConfig(store=server.url, store_seconds=0.5)), new_id()
        await held.put(lora_id, MADE, "ada")
        server.kill()
        for call in (held.get, held.delete, lambda key: held.put(key, MADE)):
            started = time.monotonic()
            assert (await refusal(call(lora_id)))[0] == "store_unavailable"
            assert time.monotonic() < started + 1.5
        assert (await refusal(held.ready()))[0] == "store_unavailable"
        server.start()
        assert same(await held.get(lora_id), MADE)
        server.process.send_signal(19)  # SIGSTOP: it takes connections, and answers nothing
        started = time.monotonic()
        answers = await asyncio.gather(*(refusal(held.get(lora_id)) for _ in range(20)))
        assert {reason for reason, _ in answers} == {"store_unavailable"}
        assert time.monotonic() < started + 3
        server.process.send_signal(18)
        assert same(await held.get(lora_id), MADE)
        await held._redis.config_set("maxmemory", "1")
        assert (await refusal(held.put(new_id(), MADE)))[0] == "store_unavailable"
        assert same(await held.get(lora_id), MADE)
        assert await held.delete(lora_id, "ada")  # who wants to be forgotten is, also then

    try:
        asyncio.run(scene())
    finally:
        with suppress(ProcessLookupError):
            server.kill()
