"""Fixtures that start real servers, once for a session: Ray (`ray_local`) and an S3 store (`s3`), both on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before anything imports ray or torch. Without RAY_AUTH_MODE, ray.init() writes ~/.ray/auth_token, and every later
# `ray start` of this user would demand it.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray's processes would compile all that they import, each anew
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # Serve's five seconds are too few when busy
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets workers starve beside anything else

import pytest
from s3_server import BUCKET, S3Server, new_server, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start a Ray come first: they last longest, and none should be left for one process at the end.

    They and all that is slow get more time, too: a process that imports torch and diffusers takes 10 to 20 s where both cores are busy.
    """
    for item in items:
        slow = item.get_closest_marker("ray") or item.get_closest_marker("slow")
        if slow and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    first = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in first)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of tests by folder: where the suite's time goes."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = report.nodeid.split("::")[0].rpartition("/")[0]
                seconds[folder] += report.duration
    line = ", ".join(f"{folder.removeprefix('tests/')} {spent:.0f}" for folder, spent in seconds.most_common())
    terminalreporter.write_line(f"seconds by folder: {line}")


pytest_plugins = ["serve_client", "chromium"]  # the HTTP API in this process: `api`, `studio`, `synthesizer`; `browser`


_S3 = new_server()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Ray on this machine. Eight logical CPUs whatever the machine has: with two, Ray Data and Train wait for ever.

    Workers inherit the store's variables from here: a runtime_env would cost each of them a process that is not there yet.
    """
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # short: socket paths end at 107 characters
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _S3.env.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=300_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, with the AWS variables of this process (and of `ray_local`'s workers) set to it."""
    with running(_S3, tmp_path_factory.mktemp("seaweedfs")):
        yield _S3


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A new, empty place in the store: `bucket/prefix`. One bucket for all, as SeaweedFS makes volumes for each."""
    return f"{BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered people and a random base model; see factory_world.py."""
    from factory_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))
