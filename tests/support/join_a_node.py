"""The corpus job on a Ray cluster on this machine that a second machine joins in the middle; fine-tuning is a sleep.

python join_a_node.py OUTPUT FINETUNE_MAX
Prints JSON: machines that committed shards, whether the one that joined is among them, people in the corpus.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", RAY_worker_niceness="0")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ray
import simulated_cluster
from lose_a_node import in_time
from ray.cluster_utils import Cluster
from simulated_cluster import SleepEmbed, SleepMake, listed, manifest, settings

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.factory import planning
from lora_diffusion.jobs import corpus
from lora_diffusion.jobs.local_ray import connect
from lora_diffusion.training.progress import Progress

PEOPLE = 16 * 40


class Make(SleepMake):
    """Says where it works, in a file a shard."""

    def __init__(self, config: Any, ledger: Any) -> None:
        super().__init__(config, ledger)
        self.folder = Path(f"{config.output}-made-by")
        self.folder.mkdir(exist_ok=True)

    def __call__(self, table: Any) -> Any:
        time.sleep(1)
        done = super().__call__(table)
        (self.folder / str(done["index"][0].as_py())).write_text(ray.get_runtime_context().get_node_id())
        return done


def main(output: str, finetune_max: str) -> None:
    folder = tempfile.mkdtemp(prefix="ray")
    cluster, memory = Cluster(), {"object_store_memory": 100_000_000}
    in_time(lambda: cluster.add_node(num_cpus=2, temp_dir=folder, include_dashboard=False, **memory))
    in_time(lambda: cluster.add_node(num_cpus=1, num_gpus=1, **memory))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    for module in (simulated_cluster, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    connect("auto")
    config = settings(output)
    need = replace(config.workers, finetune_gpus=1, finetune_cpus=0.1, finetune_max=int(finetune_max))
    config = replace(config, workers=need)
    begun = planning.begin(config, manifest(config), listed(PEOPLE))
    workers = begun.workers(ray.cluster_resources())
    progress = Progress(PEOPLE, "people", file=sys.stderr)
    with ThreadPoolExecutor(1) as pool:  # nodes can be added by the main thread alone
        job = pool.submit(corpus.make, begun, 512, workers, progress, (SleepEmbed, Make))
        while not Path(f"{output}-made-by").exists() or not list(Path(f"{output}-made-by").iterdir()):
            time.sleep(0.1)
            assert not job.done() or job.result()
        joined = in_time(lambda: cluster.add_node(num_cpus=1, num_gpus=1, **memory)).node_id
        job.result()
    by = Counter(path.read_text() for path in Path(f"{output}-made-by").iterdir())
    people = len(CorpusReader(output))
    print(json.dumps({"asked": workers, "nodes": len(by), "by_the_one_that_joined": by[joined], "people": people}))
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
