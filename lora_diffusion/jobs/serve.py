"""The endpoint: photo -> LoRA -> pictures over HTTP, on a Ray of its own unless another is named. Until Ctrl-C.

    lora-diffusion serve                                     # configs/serve_tiny.yaml, http://127.0.0.1:8000
    lora-diffusion serve port=8080 access.requests_per_minute=60
    lora-diffusion serve configs/serve_sd15.yaml base=/models/sd15 synthesizer=runs/sd15/published
    serve run serve/app.py                                   # the same, from a clone of the repository

On a cluster deploy/serve.yaml starts it: docs/guides/serve.md.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_type_hints

import yaml

from lora_diffusion.artifacts.identity import read_identity
from lora_diffusion.config import to_dict
from lora_diffusion.endpoint import APP
from lora_diffusion.extras import check
from lora_diffusion.serving.config import ServeConfig


@dataclass(frozen=True)
class Config(ServeConfig):
    """Settings of the endpoint, and where it listens.

    proxy: before the gateway; Ray's own is slower, and does not bound what waits. Where there is no HAProxy it is Ray's; of a Ray that
        runs already, what that was started with.
    """

    host: str = "127.0.0.1"  # 0.0.0.0: all who can reach this machine; only with keys, or access.open=true
    port: int = 8000  # of HTTP
    proxy: Literal["haproxy", "ray"] = "haproxy"


ROOT = Path(__file__).resolve().parents[2]
PROXY_START = (
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"  # Ray's five seconds are too few on a busy machine: `serve run` gave up
)


def dry_run(config: Config) -> str:
    return f"{config.synthesizer} on {look(config)}, {address(config)}"


def address(config: Config) -> str:
    """Of the page."""
    return f"http://{'127.0.0.1' if config.host in ('0.0.0.0', '::') else config.host}:{config.port}"


def look(config: Config) -> str:
    """The base model's name. Raises ValueError for a synthesiser, a base model or a device that is not there, and no port."""
    base = config.base or read_identity(config.synthesizer).base_name
    if config.base:
        read_identity(config.synthesizer)
    if base.startswith("/") and not Path(base).exists():
        raise ValueError(
            f"there is no base model at {base}: set base to a folder, a file, s3://bucket/prefix or a hub id"
        )
    if config.device != "cpu":
        from lora_diffusion.models.devices import resolve_device

        resolve_device(config.device)
    look_at_store(config)
    if not 0 < config.port < 65536:
        raise ValueError(f"port is {config.port}: it is a number from 1 to 65535")
    return base


def look_at_store(config: Config) -> None:
    """Raises ValueError for a Redis that cannot be used now, MissingExtra; buckets and folders are outputs, and looked at as such."""
    where = config.library.store
    if where.startswith(("redis://", "rediss://")):
        from lora_diffusion.serving.errors import ServingError
        from lora_diffusion.serving.library import open_library

        try:
            asyncio.run(open_library(config).ready())
        except ServingError as error:
            raise ValueError(f"the store of LoRAs at {where} cannot be used: {error.__cause__}") from error


def check_free(config: Config) -> None:
    """Raises ValueError if nothing can listen there."""
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {config.port} is taken: end what listens there, or choose another, such as port={config.port + 1}"
        else:
            reason = os.strerror(error.errno or 0)
            message = f"cannot listen at {config.host}:{config.port} ({reason}): choose another host or port"
        raise ValueError(message) from error


def run(config: Config, ray_address: str) -> None:
    """Raises ValueError if it ends by itself, MissingExtra for what is not installed."""
    check("serve", "ray", "fastapi", "fastapi_offline", "prometheus_client", "python_multipart")
    from lora_diffusion.endpoint.access import refuse_open_door
    from lora_diffusion.endpoint.haproxy import end_haproxy, haproxy_environment

    refuse_open_door(config.access, config.host)
    base = look(config)
    if ray_address == "local":  # a cluster listens on its own machines
        check_free(config)
    print(f"loading the synthesiser {config.synthesizer} and {base}", flush=True)
    values, application = to_dict(config), yaml.safe_load(APP.read_text(encoding="utf-8"))
    application["http_options"] = {name: values.pop(name) for name in ("host", "port")}
    proxy = values.pop("proxy")
    with tempfile.TemporaryDirectory() as folder:
        env = {PROXY_START: "60", **os.environ, "RAY_ADDRESS": ray_address}
        if proxy == "haproxy" and ray_address == "local":  # another Ray was told when it was started
            ours = haproxy_environment(Path(folder))
            env = ours | env
            values["access"]["proxies"] += bool(ours)  # it writes X-Forwarded-For
        application["applications"][0]["args"] = arguments(values)
        app = Path(folder) / "app.yaml"
        app.write_text(yaml.safe_dump(application), encoding="utf-8")
        env.pop("LORA_DIFFUSION_SERVE", None)  # words for `serve run`
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            code = until_it_ends([str(Path(sys.executable).with_name("serve")), "run", str(app)], env)
        finally:
            end_haproxy(Path(folder))
    if code:
        raise ValueError(f"`serve run` ended with {code}: its last lines say why")


def arguments(values: Mapping[str, Any]) -> dict[str, str]:
    """`values`, all of a ServeConfig's, as graph.build takes them: a Ray that runs already has neither our files nor our environment."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and is_dataclass(get_type_hints(ServeConfig)[key]):
            flat |= {f"{key}.{name}": _word(one) for name, one in value.items()}
        else:
            flat[key] = _word(value)
    return flat


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


SAYS_NOTHING = re.compile(r"(^|\s)(INFO|SUCC) |Task ServeController.graceful_shutdown failed")  # the last at each end
WHOSE = re.compile(r"\x1b\[\d+m\(ServeReplica:\S+ pid=\d+\)\x1b\[0m (?=LoRA Diffusion)")


def show(lines: IO[str]) -> None:
    """What `serve run` prints, without Ray's lines that say nothing to whoever started us."""
    for line in lines:
        if not SAYS_NOTHING.search(line):
            print(WHOSE.sub("", line), end="", file=sys.stderr, flush=True)


def until_it_ends(command: list[str], env: dict[str, str]) -> int:
    """Its exit code. Ctrl-C, SIGTERM or a closed terminal reach it through us, once: it may shut Serve down, and then its Ray."""
    # A session of its own, so that Ctrl-C is the same from a terminal as from `kill`. A shell that starts us in the background
    # has Ctrl-C ignored, and what we start would inherit that.
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    showing = threading.Thread(
        target=show, args=(process.stdout,), daemon=True
    )  # Ray's processes may outlive it, and hold the pipe
    showing.start()

    def stop(*_: object) -> None:
        process.send_signal(signal.SIGINT)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        return process.wait()
    except KeyboardInterrupt:
        stop()
        raise
    finally:
        process.wait()
        showing.join(1)
        for number, handler in before.items():
            signal.signal(number, handler)
