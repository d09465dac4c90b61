"""A job on a Ray of two CPUs, all of which its workers may take: python two_cpus.py JOB [WORD ...]."""

from __future__ import annotations

import shutil
import sys
import tempfile

import ray

from lora_diffusion.jobs.run import main

if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    code = main(sys.argv[1], sys.argv[2:])
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)
