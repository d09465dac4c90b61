"""The learning rate's course: it rises over the first steps and falls to 0 by a cosine."""

from __future__ import annotations

import math


def cosine(done: float) -> float:
    """Share of the highest rate when the share `done` of the way down lies behind: 1 at 0, 1/2 at 1/2, 0 from 1 on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_cosine(step: int, steps: int, warmup: int, highest: float = 1.0) -> float:
    """Rate of step 0, 1, ..., steps - 1: `cosine` over all steps, times a line over the first `warmup` of them."""
    return highest * min(1.0, (step + 1) / max(1, warmup)) * cosine(step / steps)
