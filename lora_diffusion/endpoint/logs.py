"""Logs of the gateway: one JSON object a line, with request ids, without photos, embeddings or prompts."""

from __future__ import annotations

import logging
import sys


def set_up_logs() -> None:
    """`lora_diffusion.serve` to stderr, each message as it is: the messages are JSON already."""
    log = logging.getLogger("lora_diffusion.serve")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
