"""What can go wrong with one request, each with a `reason` that survives the way between processes."""

from __future__ import annotations

import json
import logging
import re
from typing import Literal

log = logging.getLogger("lora_diffusion.serve")

Reason = Literal[
    "overloaded",  # the queue is full: try again later
    "deadline_exceeded",  # the caller's time was up before the work was done
    "unknown_lora",  # no LoRA of this id: never made, expired, deleted
    "not_yours",  # to be deleted with the token that came when it was made
    "stale_latent",  # a latent of a synthesiser that is not loaded (any more)
    "unknown_attribute",  # an edit that the synthesiser does not know
    "bad_lora",  # an uploaded file that is no LoRA, or one of another layout
    "store_unavailable",  # the store that keeps LoRAs does not answer, is full, or lets nobody in
    "diverged",  # the synthesiser gave NaN
]


class ServingError(Exception):
    """A request that could not be served. `reason` is one of `Reason`; the message says what to do about it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type[ServingError], tuple[Reason, str]]:
        return type(self), (self.reason, str(self))


def deadline_exceeded(where: str) -> ServingError:
    return ServingError(
        "deadline_exceeded", f"The request's time was up {where}. Allow it more time, or ask when the load is lower."
    )


def store_unavailable(error: BaseException) -> ServingError:
    """Who asks is told what to do, the log what happened."""
    told = re.sub("[0-9a-f]{32}", "ID", f"{type(error).__name__}: {error}")[:300]  # who knows an id may use its LoRA
    log.error(json.dumps({"event": "store", "error": told}))
    return ServingError(
        "store_unavailable", "The store of LoRAs cannot be used at the moment. Try again a little later."
    )
