"""What every benchmark's result says about itself: commit, machine, versions, command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lora_diffusion.artifacts.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def command() -> str:
    return " ".join(["python", *(os.path.relpath(a) if os.path.exists(a) else a for a in sys.argv)])


def write_result(name: str, result: dict[str, Any]) -> Path:
    """``benchmarks/results/<name>.json`` with the provenance beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), "command": command(), **result}, indent=2) + "\n")
    return path
