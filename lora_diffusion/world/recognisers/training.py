"""Training of a recogniser on aligned crops: schedule, resumable state, embedding of many crops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lora_diffusion.storage import open_store
from lora_diffusion.training.checkpoint import (
    SavedTensors,
    load_optimizer_tensors,
    optimizer_tensors,
    pieces,
    strip_prefix,
    with_prefix,
)
from lora_diffusion.training.schedule import cosine
from lora_diffusion.world.recognisers.crops import Pixels, augment, to_input
from lora_diffusion.world.recognisers.network import ArcFaceHead


@dataclass(frozen=True)
class TrainingConfig:
    """`epochs` over all crops; AdamW, one-cycle rate; the angular margin rises from 0 over its first `margin_warmup`."""

    epochs: int = 14
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 5e-2
    warmup: float = 0.05
    scale: float = 32.0
    margin: float = 0.4
    margin_warmup: float = 0.4
    bf16: bool = True
    seed: int = 2412
    max_seconds: float | None = None


class RecogniserTrainer:
    """Trains `model` with ArcFace loss on `crops` (N, 56, 56, 3) uint8 of `person` (N,) in 0..people-1.

    `variants` may hold several versions of the crops, (V, N, 56, 56, 3): each epoch draws one at random for each photo.
    Where `max_seconds` is set, the schedule follows the clock (the share of that time used), so that a training of a
    given length always ends with a decayed rate, on any machine; such a run is not repeatable bit for bit.
    """

    def __init__(
        self, model: nn.Module, variants_VNHWC: Pixels, person_N: NDArray[np.int64], config: TrainingConfig
    ) -> None:
        if variants_VNHWC.ndim != 5 or variants_VNHWC.shape[1] != len(person_N):
            raise ValueError(
                f"Expected crops (V, N, 56, 56, 3) for {len(person_N)} labels, got {variants_VNHWC.shape}."
            )
        self.config = config
        self.variants = variants_VNHWC
        self.person = torch.from_numpy(person_N)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = ArcFaceHead(int(person_N.max()) + 1, config.scale, 0.0)
        decayed = [p for p in model.parameters() if p.dim() > 1] + [self.head.centres_PE]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.batch_size = min(config.batch_size, len(person_N))
        self.steps_per_epoch = len(person_N) // self.batch_size
        self.epoch, self.step, self.seconds = 0, 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        if self.config.max_seconds is not None:
            return min(1.0, self.seconds / self.config.max_seconds)
        return self.step / max(1, self.config.epochs * self.steps_per_epoch)

    def _set_schedule(self) -> None:
        config, done = self.config, self.progress
        rate = done / config.warmup if done < config.warmup else cosine(done)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * max(rate, 1e-3)
        self.head.margin = config.margin * min(1.0, done / config.margin_warmup)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([self.config.seed, self.epoch])
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + self.epoch)
        order = rng.permutation(len(self.person))
        size = self.batch_size
        for start in range(0, self.steps_per_epoch * size, size):
            index = order[start : start + size]
            version = rng.integers(len(self.variants), size=size)
            yield augment(to_input(self.variants[version, index]), generator), self.person[index]

    def train(self, checkpoint: Path | None = None, report: Callable[[dict[str, float]], None] | None = None) -> None:
        """Runs to the end of the schedule; writes `checkpoint` after each epoch, calls `report` with its mean loss."""
        while self.progress < 1.0:
            losses: list[float] = []
            self.model.train()
            started = time.perf_counter()
            before = self.seconds
            for crops, person in self._batches():
                self._set_schedule()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.bf16):
                    embeddings = self.model(crops.contiguous(memory_format=torch.channels_last))
                loss = self.head(embeddings, person)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.step += 1
                losses.append(float(loss.detach()))
                self.seconds = before + time.perf_counter() - started
                if self.progress >= 1.0:
                    break
            self.epoch += 1
            if report is not None:
                report({"epoch": self.epoch, "loss": float(np.mean(losses)), "seconds": self.seconds})
            if checkpoint is not None:
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Model, ArcFace centres, optimiser moments and position, whole or not at all."""
        tensors = with_prefix("model", self.model.state_dict()) | {"head.centres_PE": self.head.centres_PE.detach()}
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        meta = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
        open_store(path.parent).write_parts(path.name, pieces(tensors, meta))

    def load(self, path: Path) -> None:
        """Continues where `save` stopped, at the start of the next epoch."""
        saved = SavedTensors(open_store(path.parent), path.name)
        tensors, meta = dict(saved), saved.meta
        self.model.load_state_dict(strip_prefix("model", tensors))
        with torch.no_grad():
            self.head.centres_PE.copy_(tensors["head.centres_PE"])
        load_optimizer_tensors(self.optimizer, strip_prefix("optimizer", tensors))
        self.epoch, self.step, self.seconds = meta["epoch"], meta["step"], meta["seconds"]


@torch.no_grad()
def embed_crops(model: nn.Module, crops_NHWC: Pixels, batch_size: int = 256) -> NDArray[np.float32]:
    """Unit embeddings (N, 512) of crops (N, 56 or 112, same, 3)."""
    model.eval()
    parts = [
        F.normalize(model(to_input(crops_NHWC[i : i + batch_size]))).numpy()
        for i in range(0, len(crops_NHWC), batch_size)
    ]
    return np.concatenate(parts).astype(np.float32)
