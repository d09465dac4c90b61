"""What a run says about itself: a JSON line for each report, TensorBoard events, curves as PNG, a line for people.

A run that goes on from a checkpoint first forgets what was reported after it, so the log of an interrupted run is that of
a calm one. Files are written whole, at checkpoints, so a bucket serves as well as a folder.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_diffusion.storage import Store
from lora_diffusion.synthesis.pca import PCA
from lora_diffusion.training.meter import duration

METRICS = "metrics.jsonl"
# Of a report, what depends on the machine and the moment and not on the mathematics.
TIMING = ("rows_per_second", "seconds_left", "waiting_for_data")
_WORDS = ("stage", "step", "of", "checkpoint", "done", *TIMING)


class RunLog:
    """The metrics of one run, in its store. One worker writes."""

    def __init__(self, store: Store, tensorboard: bool = True) -> None:
        self.store = store
        self.lines = read_metrics(store)
        self._folder = tempfile.TemporaryDirectory(prefix="tensorboard-") if tensorboard else None
        self._writers: dict[str, Any] = {}

    def forget_after(self, stage: str, step: int) -> None:
        """What an earlier run reported of `stage` after the checkpoint at `step` is said again by this one."""
        self.lines = [line for line in self.lines if line["stage"] != stage or line["step"] <= step]

    def add(self, values: Mapping[str, Any]) -> None:
        self.lines.append(dict(values))
        writer = self._writer(str(values["stage"]), int(values["step"]))
        if writer is not None:
            for name, value in values.items():
                if name not in _WORDS:
                    writer.add_scalar(name, value, values["step"])

    def picture(self, stage: str, step: int, png: bytes) -> None:
        """The newest drawn pictures beside the curves, all of them in TensorBoard."""
        self.store.write(f"plots/{stage}_drawn.png", png)
        writer = self._writer(stage, step)
        if writer is not None:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            writer.add_image("drawn", pixels, step, dataformats="HWC")

    def save(self) -> None:
        """Write the lines, the events so far and the curves."""
        self.store.write(METRICS, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        for stage, writer in self._writers.items():
            writer.flush()
            assert self._folder is not None
            for path in sorted(Path(self._folder.name, stage).iterdir()):
                self.store.write(f"tensorboard/{stage}/{path.name}", path.read_bytes())
        for stage in sorted({line["stage"] for line in self.lines}):
            lines = [line for line in self.lines if line["stage"] == stage]
            self.store.write(f"plots/{stage}.png", curves_png(lines, f"{stage}: loss"))
            if any("validation_rank" in line for line in lines):
                self.store.write(f"plots/{stage}_rank.png", curves_png(lines, f"{stage}: percentile rank", "rank"))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _writer(self, stage: str, step: int) -> Any:
        if self._folder is None:
            return None
        if stage not in self._writers:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "TensorBoard files need the package tensorboard: pip install 'lora-diffusion[ray]', or set "
                    "tensorboard=false"
                ) from error
            # TensorBoard, too, forgets what an interrupted run said of steps from `step` on
            self._writers[stage] = SummaryWriter(str(Path(self._folder.name, stage)), purge_step=step)
        return self._writers[stage]


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """The reports of a run so far; none if it has not begun."""
    try:
        text = store.read(METRICS).decode()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]


def progress_line(values: Mapping[str, Any]) -> str:
    """`vae 200/2000  loss 0.71, validation 0.69, 12,000 rows/s, 3 min 05 s left`."""
    parts = [f"loss {values['loss']:.4g}"]
    if "validation_loss" in values:
        parts.append(f"validation {values['validation_loss']:.4g}")
    for name in ("rank", "score", "likeness", "second", "prompts_short", "detail"):
        if f"validation_{name}" in values:
            parts.append(f"{name.replace('_', ' ')} {values[f'validation_{name}']:.3f}")
    parts += [f"{values['rows_per_second']:,.0f} rows/s", f"{duration(values['seconds_left'])} left"]
    if values["waiting_for_data"] > 0.1:
        parts.append(f"{values['waiting_for_data']:.0%} of the time waiting for data")
    return f"{values['stage']} {values['step']}/{values['of']}  {', '.join(parts)}"


def curves_png(lines: Sequence[Mapping[str, Any]], title: str, key: str = "loss") -> bytes:
    """Training and validation against the step."""
    figure, axes = _figure()
    for name, label in ((key, "training"), (f"validation_{key}", "validation, averaged weights")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    if key == "loss" and all(line.get(key, 1.0) > 0 for line in lines):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    return _png(figure, axes, title)


def explained_variance(pca: PCA, rows: int) -> dict[str, Any]:
    """The paper's Figure 3 as numbers: share of the corpus' variance in the first 1, 2, ... principal components."""
    cumulative = pca.curve()
    thresholds: dict[str, int | None] = {}
    for share in (0.5, 0.9, 0.95, 0.99):
        reached = [count for count, value in enumerate(cumulative, start=1) if value >= share - 1e-9]
        thresholds[f"{share:.0%}"] = reached[0] if reached else None
    return {
        "rows": rows,
        "components": len(cumulative),
        "total_variance": float(pca.total_variance),
        "components_for_share": thresholds,
        "cumulative": cumulative,
    }


def explained_variance_png(curves: Mapping[str, Sequence[float]], title: str = "explained variance") -> bytes:
    """Cumulative explained variance over the number of components, one curve for each name."""
    figure, axes = _figure()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("principal components")
    axes.set_ylabel("share of variance explained")
    return _png(figure, axes, title)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'lora-diffusion[ray]'") from error
    figure = Figure(figsize=(6.4, 4.0), dpi=120)
    return figure, figure.add_subplot()


def _png(figure: Any, axes: Any, title: str) -> bytes:
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    data = io.BytesIO()
    # no date and no version inside: equal curves give equal files
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def losses(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reports without what depends on the machine: two runs of the same training say the same here."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
