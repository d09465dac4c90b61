"""When Ray ends under a job, the job says so and ends with code 3."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import socket, sys, time, types
from lora_diffusion.jobs import watch

watch.LOOK, watch.GONE_AFTER = 0.05, {watch.GCS: 0.3, watch.RAYLET: 0.3}
gcs = socket.create_server(("127.0.0.1", 0))
node = types.SimpleNamespace(
    gcs_address=f"127.0.0.1:{gcs.getsockname()[1]}",
    raylet_socket_name=sys.argv[1] if sys.argv[1:] else None,
    kill_all_processes=lambda **_: print("the rest was ended", flush=True),
)
ray = sys.modules["ray"] = types.ModuleType("ray")
ray._private = types.SimpleNamespace(worker=types.SimpleNamespace(global_worker=types.SimpleNamespace(node=None)))
with watch.watching_ray("corpus"):
    time.sleep(0.2)  # before Ray is begun there is nothing to watch
    ray._private.worker.global_worker.node = node
    time.sleep(0.6)
    if not sys.argv[1:]:
        print("alive", flush=True)
        gcs.close()
    time.sleep(60)
"""


@pytest.mark.parametrize(("words", "part"), [([], "Ray's GCS"), (["/nowhere/raylet"], "the raylet of this machine")])
def test_a_part_of_ray_that_is_gone_is_named(words: list[str], part: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=50)
    assert done.returncode == 3
    assert done.stderr == f"corpus: {part} ended: run the same command again\n"
    assert done.stdout == ("alive\n" if not words else "") + "the rest was ended\n"
