"""jobs/publish.py: directions from photos of people with labels, where no corpus was made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_diffusion.jobs.publish import Config, dry_run, run
from lora_diffusion.synthesis.synthesizer import Synthesizer


def test_directions_come_from_photos_as_well(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of those who have labels; the others' photos are not looked at."""
    people, labels = str(world / "people"), str(tmp_path / "labels.parquet")
    names = sorted(path.name for path in (world / "people").iterdir() if path.is_dir())[:6]
    tall, late = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], [3.0, 2.0, 5.0, 4.0, 0.0, 1.0, 0.0]
    pq.write_table(pa.table({"identity": [*names, "nobody"], "tall": tall, "late": late}), labels)
    config = Config("tiny", str(tmp_path / "out"), people=people, labels=labels, dtype="int8")
    assert "Synthesizer(" in dry_run(config)
    assert not (tmp_path / "out").exists()
    run(config, "local")
    assert "correlation with the labels: tall" in capsys.readouterr().out
    made = Synthesizer.from_pretrained(tmp_path / "out")
    assert made.directions is not None
    assert made.directions.names == ("tall", "late")
    assert np.isfinite(made.directions.separation_A).all()
    assert "Synthesizer(" in dry_run(replace(config, labels="synthetic"))


def test_what_does_not_fit_is_said_before_anything_is_embedded(world: Path, tmp_path: Path) -> None:
    people, out = str(world / "people"), str(tmp_path / "out")
    labels = str(tmp_path / "labels.parquet")
    pq.write_table(pa.table({"identity": ["nobody"], "tall": [1.0]}), labels)
    with pytest.raises(ValueError, match=f"nobody of {people} is in {labels}"):
        dry_run(Config("tiny", out, people=people, labels=labels))
    with pytest.raises(ValueError, match="name one of them"):
        dry_run(Config("tiny", out, people=people, corpus=people, labels=labels))
    with pytest.raises(ValueError, match="belong together"):
        dry_run(Config("tiny", out, people=people))
