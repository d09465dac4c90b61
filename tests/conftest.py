"""Fixtures that start real servers, once for a session: Ray (`ray_local`) and an S3 store (`s3`), both on loopback."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before anything imports ray or torch. Without RAY_AUTH_MODE, ray.init() writes ~/.ray/auth_token, and every later
# `ray start` of this user would demand it.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # Serve's five seconds are too few when busy
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets workers starve beside anything else

import pytest

pytest_plugins = ["serve_client"]  # the HTTP API in this process: `api`, `studio`, `synthesizer`


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


_BUCKET = "tests"
_S3 = S3Server(f"http://127.0.0.1:{free_port()}", "test" + secrets.token_hex(8), secrets.token_hex(16))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Ray on this machine. Eight logical CPUs whatever the machine has: with two, Ray Data and Train wait for ever."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # short: socket paths end at 107 characters
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", **_S3.env}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, a real S3 server, with the AWS variables of this process (and of `ray_local`'s workers) set to it."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": _S3.secret_key}], "actions": actions}
        for key, actions in (
            (_S3.access_key, ["Admin", "Read", "Write", "List", "Tagging"]),
            (_S3.reader_access_key, ["Read", "List"]),
        )
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    command = [
        str(Path(sys.executable).with_name("weed")),
        "-logtostderr=true",
        *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={free_port()}", f"-volume.port={free_port()}", "-filer", f"-filer.port={free_port()}"),
        *("-s3", f"-s3.port={_S3.endpoint.rpartition(':')[2]}", f"-s3.config={folder / 'identities.json'}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-master.volumeSizeLimitMB=256", "-volume.max=20", "-master.telemetry=false"),
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    saved = {name: os.environ.get(name) for name in _S3.env}
    os.environ.update(_S3.env)
    try:
        _wait_until_ready(server, folder / "log")
        _make_bucket()
        yield _S3
    finally:
        server.kill()  # its data is this session's: nothing to save, and a gentle end takes ten seconds
        server.wait()
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_until_ready(server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(_S3.endpoint, timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403:  # it is up, and wants credentials
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A new, empty place in the store: `bucket/prefix`. One bucket for all, as SeaweedFS makes volumes for each."""
    return f"{_BUCKET}/{secrets.token_hex(8)}"


def _make_bucket() -> None:
    """The server answers before its volumes can take a write: try until they can."""
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    deadline = time.monotonic() + 30
    while True:
        try:
            if not filesystem.exists(_BUCKET):
                filesystem.mkdir(_BUCKET)
            filesystem.pipe_file(f"{_BUCKET}/.ready", b"x")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered people and a random base model; see factory_world.py."""
    from factory_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))
