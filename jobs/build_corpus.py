#!/usr/bin/env python
"""`lora-diffusion corpus`, as a file for `ray job submit`: lora_diffusion/jobs/corpus.py says what it does and how."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # Ray runs this file with jobs/ on the path, not the repository

from lora_diffusion.jobs.run import command

if __name__ == "__main__":
    sys.exit(command("corpus"))
