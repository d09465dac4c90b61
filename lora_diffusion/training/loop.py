"""The training loop of a stage: data-parallel, resumable to the same losses, stopped early by validation.

What makes one worker and many, and an interrupted run and a calm one, give the same losses:

- the global batch of a step, and all its random numbers, depend on the seed and the step alone; workers take shares of it;
- a stage returns one loss for each row, and the loop divides by the rows of the global batch, so unequal shares are exact;
- a checkpoint holds weights, their moving average, the optimiser and the state of early stopping; nothing else is state.

Dropout is the exception: it draws by itself. It is the same again after an interruption, but not with other workers.

A batch whose gradient is not finite is left out and counted, where a stage allows it (`leaves_out_bad_batches`).

Axes: B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.storage import Store
from lora_diffusion.training.distributed import Group, Parallel, whole
from lora_diffusion.training.meter import Meter
from lora_diffusion.training.schedule import warmup_cosine
from lora_diffusion.training.state import TrainingState

Batch = dict[str, Tensor]
Slots = NDArray[np.int64]
Report = Callable[[dict[str, Any]], None]
Leaving = Callable[[], bool]
MOST_BAD_IN_A_ROW = 20


@dataclass(frozen=True)
class LoopConfig:
    """AdamW, linear warm-up, cosine decay to 0. `batch_size` is global: all workers together.

    Validation is of the averaged weights, before the first step and every `validate_every`; the best of them are the result,
    or with `keep=newest` those of the last one: where a few validation rows decide by chance.
    `patience`: so many validations without a better one end the training; 0: never.
    """

    steps: int = 2000  # optimiser steps at most
    batch_size: int = 64  # rows of a step, of all workers together
    learning_rate: float = 1e-3  # highest rate of AdamW; falls to 0 by a cosine
    warmup: int = 100  # the rate rises over so many steps
    weight_decay: float = 0.01  # of AdamW
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    clip_norm: float = 1.0  # gradients are clipped to this norm
    ema_decay: float = 0.999  # of the averaged weights, which are what is kept
    validate_every: int = 100  # steps between validations
    patience: int = 0
    keep: Literal["best", "newest"] = "best"  # averaged weights; newest: patience has no say
    log_every: int = 20  # steps between reports
    checkpoint_every: int = 200  # steps between checkpoints
    seed: int = 0  # of batches and noise

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Stage(nn.Module):
    """What is trained. The loop reads `inputs` on the CPU, draws `draws` on the device, and calls the module with both.

    selection_metrics: what tells the best validation, the loss or parts of it; the lowest is the best, a tie is decided by the
        next. Without validation rows the newest weights are the best.
    leaves_out_bad_batches: a gradient that is not finite costs its step, not the run; too many in a row still end it.
    """

    selection_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    leaves_out_bad_batches: ClassVar[bool] = False
    train_slots: Slots
    validation_slots: Slots

    def inputs(self, slots: Slots) -> Batch:
        """The rows, read from where they lie: tensors with B in front."""
        raise NotImplementedError

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """All random numbers of a global batch of `count` rows: tensors with B in front, on the generator's device."""
        raise NotImplementedError

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each row (B,), and parts to report, (B,) each. In eval mode: what validation means."""
        raise NotImplementedError

    def rate(self, name: str, parameter: Tensor, learning_rate: float) -> float:
        """Factor of the learning rate for one of the parameters."""
        return 1.0

    def summarise(self, values: dict[str, Any]) -> dict[str, Any]:
        """More figures of a validation, from the means over its rows."""
        return {}


def epoch_batches(slots: Slots, batch_size: int, seed: int, step: int = 0) -> Iterator[Slots]:
    """Endless global batches, each epoch in its own order, as if `step` of them had been drawn before.

    A corpus smaller than a batch gives batches of the whole corpus.
    """
    size = min(batch_size, len(slots))
    per_epoch = len(slots) // size
    epoch_of_order, order = -1, slots
    while True:
        epoch, within = divmod(step, per_epoch)
        if epoch != epoch_of_order:
            epoch_of_order, order = epoch, np.random.default_rng([seed, epoch]).permutation(slots)
        yield order[within * size : (within + 1) * size]
        step += 1


class Loop:
    """Trains `stage`, from the newest checkpoint of `name` in `store` if there is one.

    `identity`: what else must be the same to resume (architecture, data), as JSON values.
    Raises ValueError if the checkpoint there was made with other settings.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        config: LoopConfig,
        store: Store,
        group: Group | None = None,
        parallel: Parallel = "ddp",
        bfloat16: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.stage, self.config = name, stage, config
        self.group, self.bfloat16 = group or Group(), bfloat16
        self.module = self.group.wrap(stage, parallel)
        parameters: dict[str, Tensor] = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        self.parameters = list(parameters.values())
        lr = config.learning_rate
        groups: dict[float, list[Tensor]] = {}
        for parameter_name, parameter in parameters.items():
            groups.setdefault(stage.rate(parameter_name, parameter, lr), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": some, "rate": rate} for rate, some in groups.items()],
            lr=lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        identity = {**(identity or {}), "judged_by": stage.selection_metrics}
        self.state = TrainingState(name, store, parameters, self.optimizer, config, identity)
        self.resumed_at = self.state.restore()
        self._bad_in_a_row = 0

    def best_weights(self) -> Batch:
        """The averaged weights of the best validation, by their names in the stage: the result of training."""
        return self.state.load_best()

    def run(self, report: Report = lambda values: None, leaving: Leaving = lambda: False) -> None:
        """To the last step, or until validation no longer improves.

        `report(values)` is called on every worker, equally often: means since the last report, validation if there was
        one, speed; `checkpoint` says that the state is safe, `done` that this was the last. `leaving()`, asked every
        `log_every` steps on all workers: whether a machine is about to be taken away, so that the state is saved now.
        Raises ValueError if the loss is no longer finite.
        """
        state, config = self.state, self.config
        if state.step == 0:
            self._validate()  # what training begins with may be the best there is
        meter = Meter(state.step)
        batches = epoch_batches(self.stage.train_slots, config.batch_size, config.seed, state.step)
        with ThreadPoolExecutor(1) as reader:  # the next batch is read while this one is computed
            ready = reader.submit(self._load, next(batches))
            while state.step < config.steps and not state.done:
                with meter.waiting():
                    batch, size = ready.result()
                ready = reader.submit(self._load, next(batches))
                meter.add(self._one_step(batch, size), size)
                last = state.step == config.steps
                validated = self._validate() if last or state.step % config.validate_every == 0 else {}
                state.done = state.done or last
                told = state.step % config.log_every == 0
                leaves = told and leaving()
                safe = state.done or leaves or state.step % config.checkpoint_every == 0
                if validated or safe or told:
                    means = meter.means(self.group)
                    values = {**means, "learning_rate": self.learning_rate(state.step - 1), **validated}
                    self._check(values)
                    if safe:
                        state.save(write=self.group.rank == 0)
                    where = {"stage": self.name, "step": state.step, "of": config.steps}
                    speed = meter.speed(state.step, config.steps)
                    report({**where, **values, **speed, "checkpoint": safe, "done": state.done})

    def learning_rate(self, step: int) -> float:
        return warmup_cosine(step, self.config.steps, self.config.warmup, self.config.learning_rate)

    def _load(self, slots: Slots) -> tuple[Batch, int]:
        batch = self.stage.inputs(slots[self.group.rank :: self.group.world_size])
        if self.group.device.type == "cuda":
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch, len(slots)

    def _forward(self, batch: Batch, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.group.device
        draws = self.stage.draws(size, torch.Generator(device).manual_seed(seed))
        draws = {name: value[self.group.rank :: self.group.world_size] for name, value in draws.items()}
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            losses, parts = self.module(batch, draws, self.state.step)
        return losses.float(), parts

    def _one_step(self, batch: Batch, size: int) -> Batch:
        """Sums over this worker's rows, for the report."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.learning_rate(self.state.step)
        seed = (self.config.seed + 1) * 1_000_003 + self.state.step
        torch.manual_seed(seed * 1024 + self.group.rank)  # of dropout, which no checkpoint holds
        losses, parts = self._forward(batch, size, seed)
        # the wrapper averages gradients over the workers: times their number, it is the mean over the global batch
        loss = losses.sum() * (self.group.world_size / size)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        sums = {name: value.detach().float().sum() for name, value in {"loss": losses, **parts}.items()}
        if self.stage.leaves_out_bad_batches:
            good = bool(torch.isfinite(whole(norm)))  # the same on all workers
            self._bad_in_a_row = 0 if good else self._bad_in_a_row + 1
            if self._bad_in_a_row >= MOST_BAD_IN_A_ROW:
                raise ValueError(
                    f"stage {self.name}: the gradients of {MOST_BAD_IN_A_ROW} batches in a row were not finite, up to step "
                    f"{self.state.step}. Lower {self.name}_training.learning_rate and choose another output"
                )
            sums["left_out"] = losses.new_full((), 0.0 if good else len(losses))
            if not good:
                self.state.advance(self.config.ema_decay)
                zero = losses.new_zeros(())
                return {
                    **{name: torch.nan_to_num(value, 0.0, 0.0, 0.0) for name, value in sums.items()},
                    "grad_norm": zero,
                }
        self.optimizer.step()
        self.state.advance(self.config.ema_decay)
        # the norm is the same on all workers: each gives its share of the sum
        return {**sums, "grad_norm": whole(norm) * (size / self.group.world_size)}

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Losses of the averaged weights over all validation rows, with the same random numbers every time."""
        slots, size, totals = self.stage.validation_slots, self.config.batch_size, Meter(0)
        with self.state.averaged():
            self.module.eval()
            for start in range(0, len(slots), size):
                part = slots[start : start + size]
                losses, parts = self._forward(self._load(part)[0], len(part), 7_000_003 + start)
                totals.add({name: value.double().sum() for name, value in {"loss": losses, **parts}.items()}, len(part))
            self.module.train()
            values: dict[str, Any] = {}
            if len(slots):
                values = {f"validation_{name}": value for name, value in totals.means(self.group).items()}
                values |= self.stage.summarise(values)
            names = self.stage.selection_metrics
            newest = self.config.keep == "newest" or not len(slots)
            score = [-float(self.state.step)] if newest else [values[f"validation_{name}"] for name in names]
            if self.state.judge(score, self.config.patience):
                self.state.save_best(write=self.group.rank == 0)
        return values

    def _check(self, values: dict[str, float]) -> None:
        """Before anything is saved: a run that diverged keeps its last good checkpoint."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"stage {self.name} diverged: {', '.join(bad)} is not finite at step {self.state.step}. Lower "
                f"{self.name}_training.learning_rate and choose another output"
            )
