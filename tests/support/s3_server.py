"""SeaweedFS from PyPI: a real S3 server on loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "tests"


def free_port() -> int:
    """A TCP port of loopback that is free together with port + 10000, where SeaweedFS puts its gRPC."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        return port


@dataclass(frozen=True)
class S3Server:
    """A running store; `env` are the AWS variables that lead to it, `reader_env` those of one who may not write."""

    endpoint: str
    access_key: str
    secret_key: str
    reader_access_key: str = "reader"

    @property
    def reader_env(self) -> dict[str, str]:
        return {**self.env, "AWS_ACCESS_KEY_ID": self.reader_access_key}

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def new_server() -> S3Server:
    """Where one could run, with credentials of its own; `running` starts it."""
    return S3Server(f"http://127.0.0.1:{free_port()}", "test" + secrets.token_hex(8), secrets.token_hex(16))


class Weed:
    """The server's process, with its data in `folder`: it can be killed and started again."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        self.server, self.log = server, folder / "log"
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": server.secret_key}], "actions": actions}
            for key, actions in (
                (server.access_key, ["Admin", "Read", "Write", "List", "Tagging"]),
                (server.reader_access_key, ["Read", "List"]),
            )
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        self.command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={free_port()}", f"-volume.port={free_port()}", "-filer", f"-filer.port={free_port()}"),
            *("-s3", f"-s3.port={server.endpoint.rpartition(':')[2]}", f"-s3.config={folder / 'identities.json'}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=256", "-volume.max=20", "-master.telemetry=false"),
        ]

    def start(self) -> None:
        """Returns when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.server.endpoint, timeout=2)
            except urllib.error.HTTPError as error:
                if error.code == 403:  # it is up, and wants credentials
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"SeaweedFS did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Its data is this session's: a gentle end takes ten seconds."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(server: S3Server, folder: Path) -> Iterator[Weed]:
    """The server, with its data in `folder`, one bucket, and the AWS variables of this process set to it."""
    weed = Weed(server, folder)
    saved = {name: os.environ.get(name) for name in server.env}
    os.environ.update(server.env)
    try:
        weed.start()
        _make_bucket()
        yield weed
    finally:
        weed.kill()
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _make_bucket() -> None:
    """The server answers before its volumes can take a write: try until they can."""
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    deadline = time.monotonic() + 30
    while True:
        try:
            if not filesystem.exists(BUCKET):
                filesystem.mkdir(BUCKET)
            filesystem.pipe_file(f"{BUCKET}/.ready", b"x")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
