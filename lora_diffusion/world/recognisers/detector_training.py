"""Training of the tiny detector on composites drawn anew for every batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lora_diffusion.training.schedule import cosine
from lora_diffusion.world.recognisers.composites import MAX_FACES, Composite, Labelled, compose
from lora_diffusion.world.recognisers.detector import STRIDE, FaceDetector, detection_loss, targets


@dataclass(frozen=True)
class DetectorTrainingConfig:
    """`steps` batches of canvases of `canvas` px; AdamW, cosine rate; with `max_seconds` it decays by the clock and ends then."""

    steps: int = 2000
    batch_size: int = 48
    canvas: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    bf16: bool = True
    seed: int = 2412
    report_every: int = 100
    max_seconds: float | None = None


def as_batch(composites: list[Composite]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input (B, 3, S, S), boxes (B, F, 4), points (B, F, 5, 2), present (B, F) bool; F is two."""
    batch = len(composites)
    boxes, points = np.zeros((batch, MAX_FACES, 4), np.float32), np.zeros((batch, MAX_FACES, 5, 2), np.float32)
    present = np.zeros((batch, MAX_FACES), bool)
    for i, composite in enumerate(composites):
        count = len(composite.boxes)
        boxes[i, :count], points[i, :count], present[i, :count] = composite.boxes, composite.points, True
    pixels = torch.from_numpy(np.stack([c.canvas for c in composites])).permute(0, 3, 1, 2).float()
    return (pixels - 127.5) / 128.0, torch.from_numpy(boxes), torch.from_numpy(points), torch.from_numpy(present)


def train_detector(
    model: FaceDetector,
    data: Labelled,
    config: DetectorTrainingConfig,
    report: Callable[[dict[str, float]], None] | None = None,
) -> FaceDetector:
    """Trains `model` in place; calls `report` every `report_every` steps with their mean loss."""
    rng = np.random.default_rng([config.seed, 7])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    started, losses = time.perf_counter(), []
    for step in range(config.steps):
        seconds = time.perf_counter() - started
        done = step / config.steps
        if config.max_seconds is not None:
            done = max(done, seconds / config.max_seconds)
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / 100) * cosine(done)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * max(rate, 1e-3)
        pixels, boxes, points, present = as_batch([compose(data, config.canvas, rng) for _ in range(config.batch_size)])
        cells = config.canvas // STRIDE
        score, values, weight = targets(boxes, points, present, cells, cells)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
            maps = model(pixels.contiguous(memory_format=torch.channels_last))
        loss = detection_loss(maps.float(), score, values, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if report is not None and (step + 1) % config.report_every == 0:
            report(
                {
                    "step": step + 1,
                    "loss": float(np.mean(losses[-config.report_every :])),
                    "seconds": time.perf_counter() - started,
                }
            )
    return model.eval()
