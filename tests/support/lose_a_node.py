"""Builds a corpus on a cluster of three Ray nodes on this machine, and takes one away in the middle.

python lose_a_node.py CONFIG OUTPUT
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import ray
from ray.cluster_utils import Cluster

from lora_diffusion.jobs.run import main as run


def in_time(start: Callable[[], Any]) -> Any:
    """A node has 30 s to start, which a busy machine may need for other things: three times."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def main(config: str, output: str) -> int:
    folder = tempfile.mkdtemp(prefix="ray")
    memory = 150_000_000
    head = {"num_cpus": 1, "object_store_memory": memory, "temp_dir": folder, "include_dashboard": False}
    cluster = Cluster()
    in_time(lambda: cluster.add_node(**head))
    nodes = [in_time(lambda: cluster.add_node(num_cpus=2, object_store_memory=memory)) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose_one() -> None:
        while not list(Path(output, "shards").glob("*.parquet")):
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        print("a node was lost", flush=True)

    threading.Thread(target=lose_one, daemon=True).start()
    # Two CPUs for each fine-tuning worker: the head, with one, takes none.
    words = ["workers.finetune_cpus=2", "workers.finetune_max=2", "workers.embed_cpus=0.5"]
    code = run("corpus", ["--config", config, f"output={output}", *words])
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
