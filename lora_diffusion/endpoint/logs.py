"""What reaches the terminal: of the gateway one JSON object a line, without photos, embeddings or prompts; of Ray Serve warnings."""

from __future__ import annotations

import logging
import sys
from typing import Any


def set_up_logs(requests: bool) -> None:
    """`lora_diffusion.serve` to stderr, each message as it is: the messages are JSON already. requests: a line for each, too."""
    log = logging.getLogger("lora_diffusion.serve")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if requests else logging.WARNING)
    log.propagate = False


SAYS_NOTHING = (  # warnings of Serve at every start and end
    "Cannot deregister autoscaling state",
    "won't accept connections from HAProxy",
)


def only_warnings() -> list[Any]:
    """Ray Serve's controller and proxies call this when they start, by serve/app.py. No middlewares come of it."""
    logging.getLogger("ray.serve").addFilter(_to_file)
    return []


def _to_file(record: logging.LogRecord) -> bool:
    if record.levelno < logging.WARNING or any(text in record.getMessage() for text in SAYS_NOTHING):
        record.log_to_stderr = False  # Serve's own mark
    return True
