"""A small TCP proxy in front of an S3 server that answers 503 SlowDown or 500, hangs or breaks connections, as busy stores do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

HANG = 2.0
_SLOW_DOWN_BODY = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'
)
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_SLOW_DOWN_BODY), _SLOW_DOWN_BODY)
)


class FaultyProxy:
    """Forwards to `target`, one request for each connection; a share of them fails in one of five ways.

    `throttled`, `failed`: 503 or 500 before the server sees the request. `refused`: the connection is reset at once. `hung`: it is
    silent for HANG seconds, and then reset. `cut`: the request reaches the server, and its answer breaks off in the middle.
    """

    def __init__(self, target: str, seed: int, **shares: float) -> None:
        host, _, port = target.rpartition("//")[2].rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self.shares = shares
        self.counts = dict.fromkeys(("passed", *shares), 0)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _draw(self) -> str:
        with self._lock:
            number, fate = self._random.random(), "passed"
            for name, share in self.shares.items():
                if number < share:
                    fate = name
                    break
                number -= share
            self.counts[fate] += 1
            return fate

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            request = _read_request(client)
            if not request:
                return
            fate = self._draw()
            if fate == "throttled":
                client.sendall(_SLOW_DOWN)
            elif fate == "failed":
                client.sendall(_SLOW_DOWN.replace(b"503 Slow Down", b"500 Internal Server Error"))
            elif fate in ("refused", "hung"):
                time.sleep(HANG if fate == "hung" else 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # RST instead of FIN
            else:
                self._forward(client, request, cut=fate == "cut")

    def _forward(self, client: socket.socket, request: bytes, cut: bool) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
        with socket.create_connection(self._target) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = b"".join(iter(lambda: server.recv(65536), b""))
        client.sendall(answer[: len(answer) // 2] if cut else answer)


def _read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    if headers.get(b"expect", b"").strip() == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    missing = int(headers.get(b"content-length", b"0")) - len(body)
    while missing > 0:
        part = client.recv(65536)
        if not part:
            return b""
        data, missing = data + part, missing - len(part)
    return data


@contextlib.contextmanager
def faulty(target: str, seed: int = 0, **shares: float) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, seed, **shares)
    try:
        yield proxy
    finally:
        proxy.close()
