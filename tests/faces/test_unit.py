"""Length 1, once: what has it already is left alone, whichever way the processor rounds."""

from __future__ import annotations

import numpy as np

from lora_diffusion.faces.unit import unit


def test_it_has_length_1_and_doing_it_again_changes_no_bit() -> None:
    vectors = np.random.default_rng(0).standard_normal((500, 512)).astype(np.float32) * 30
    once = unit(vectors)
    assert np.allclose(np.linalg.norm(once.astype(np.float64), axis=1), 1, atol=1e-6)
    assert np.array_equal(unit(once), once)
    assert np.array_equal(unit(np.asarray(once.tolist())), once)  # through JSON


def test_zeros_stay_zeros() -> None:
    assert np.array_equal(unit(np.zeros((2, 3))), np.zeros((2, 3), np.float32))
