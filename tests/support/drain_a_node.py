"""Trains on a machine of a Ray cluster on this machine that is drained in the middle, as a spot machine is before it is taken away.

python drain_a_node.py CORPUS OUTPUT
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", RAY_worker_niceness="0")
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"

import ray
from lose_a_node import in_time
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from lora_diffusion.jobs.run import main as run

NOTICE_SECONDS = 5


def main(corpus: str, output: str) -> int:
    folder = tempfile.mkdtemp(prefix="ray")
    memory = {"object_store_memory": 150_000_000}
    cluster = Cluster()
    in_time(lambda: cluster.add_node(num_cpus=0, temp_dir=folder, include_dashboard=False, **memory))
    first = in_time(lambda: cluster.add_node(num_cpus=1, **memory))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    second = in_time(lambda: cluster.add_node(num_cpus=1, resources={"later": 1}, **memory))

    def drain_the_one_at_work() -> None:
        while not Path(output, "linear_guess.safetensors").exists():  # after it the denoiser is trained
            time.sleep(0.05)
        time.sleep(1)
        workers = [
            actor for actor in ray._private.state.actors().values() if "RayTrainWorker" in actor["ActorClassName"]
        ]
        node_id = workers[-1]["Address"]["NodeID"]
        deadline = int(1000 * (time.time() + NOTICE_SECONDS))
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=cluster.address).drain_node(node_id, reason, "taken back", deadline)
        print(f"a node is drained: {accepted} {why}", flush=True)
        time.sleep(NOTICE_SECONDS)
        cluster.remove_node(first if first.node_id == node_id else second, allow_graceful=False)

    threading.Thread(target=drain_the_one_at_work, daemon=True).start()
    words = [f"corpus={corpus}", f"output={output}", "code_space=pca", "pca.num_components=4", "standardise=together"]
    words += [
        "denoiser.width=32",
        "denoiser.depth=1",
        "denoiser_training.batch_size=16",
        "denoiser_training.patience=0",
    ]
    words += [
        "denoiser_training.steps=4000",
        "denoiser_training.log_every=50",
        "denoiser_training.checkpoint_every=100000",
    ]
    code = run("train", [*words, "denoiser_training.validate_every=4000", "workers.cpus=1"])
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
