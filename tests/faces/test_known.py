"""What a recogniser knows: near faces are within the limit, others are not, and the file says the same again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_diffusion.faces.known import DIRECTIONS, KnownFaces


def test_strange_values_are_beyond_the_limit_and_the_file_keeps_that(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    width = DIRECTIONS + 60
    mixing = rng.standard_normal((30, width)) / 5

    def faces(count: int, noise: float = 0.05) -> np.ndarray:
        return (rng.standard_normal((count, 30)) @ mixing + noise * rng.standard_normal((count, width))).astype(
            np.float32
        )

    photographs = faces(200) + rng.standard_normal(width).astype(np.float32) * 0.2
    known = KnownFaces.fit(["a", "b"], faces(3000), photographs, embedding=200)
    known.calibrate(faces(1000), limit=0.99, sure=0.9)
    assert 0 < known.sure < 1
    assert 0.97 < (known.distances(faces(1000)) <= 1).mean() < 1
    assert (known.distances(faces(100, noise=0.2)) > 1).all()  # off the directions in which faces differ
    assert (known.distances(photographs) > 1).mean() > 0.9
    known.save(tmp_path / "known.npz")
    again = KnownFaces.load(tmp_path / "known.npz")
    assert (again.maps, round(again.sure, 5)) == (["a", "b"], round(known.sure, 5))
    probes = np.concatenate([faces(50), faces(50, noise=0.1)])
    assert np.allclose(again.distances(probes), known.distances(probes), rtol=0.1)
