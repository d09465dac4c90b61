"""The endpoint: photo -> LoRA -> pictures over HTTP, on a Ray of its own unless another is named. Until Ctrl-C.

    lora-diffusion serve                                     # configs/serve_tiny.yaml, http://127.0.0.1:8000
    lora-diffusion serve configs/serve_sd15.yaml base=/models/sd15 synthesizer=runs/sd15/synthesizer
    serve run serve/app.py                                   # the same, from a clone of the repository

On a cluster deploy/serve.yaml starts it: docs/guides/serve.md.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_diffusion.config import to_yaml
from lora_diffusion.endpoint import APP
from lora_diffusion.serving.config import ServeConfig

Config = ServeConfig
ROOT = Path(__file__).resolve().parents[2]
HANDED_ON = "LORA_DIFFUSION_SERVE"  # lora_diffusion/endpoint/graph.py reads its configuration from there


def dry_run(config: ServeConfig) -> str:
    return f"{config.synthesizer} on {config.base}"


def run(config: ServeConfig, ray_address: str) -> None:
    """Raises ValueError if it ends by itself."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "serve.yaml"
        settings.write_text(to_yaml(config))
        env = {**os.environ, "RAY_ADDRESS": ray_address, HANDED_ON: f"config={shlex.quote(str(settings))}"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(APP)]
        code = subprocess.run(command, env=env, check=False).returncode
    if code:
        raise ValueError(f"`serve run {APP}` ended with {code}: its last lines say why")
