"""The learning rate rises over the first steps and falls to 0 by a cosine."""

from __future__ import annotations

import pytest

from lora_diffusion.training.schedule import cosine, warmup_cosine


def test_the_cosine_falls_from_one_to_zero_and_stays_there() -> None:
    assert [cosine(done) for done in (0.0, 1 / 3, 0.5, 2 / 3, 1.0, 7.0)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


def test_the_rate_rises_by_a_line_while_the_cosine_falls() -> None:
    rates = [warmup_cosine(step, steps=6, warmup=3, highest=0.1) for step in range(6)]
    shares = [1 / 3, 2 / 3 * 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert rates == pytest.approx([0.1 * share for share in shares])


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_highest_rate(warmup: int) -> None:
    assert warmup_cosine(0, steps=10, warmup=warmup, highest=3e-3) == 3e-3
