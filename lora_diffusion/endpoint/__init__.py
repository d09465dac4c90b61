"""The HTTP API and its page over the stages of `lora_diffusion.serving`: on Ray Serve (`graph`), or in one process (`local`)."""

from pathlib import Path

APP = Path(__file__).with_name("app.yaml")  # what `lora-diffusion serve` hands to `serve run`
