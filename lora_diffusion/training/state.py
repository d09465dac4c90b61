"""The state of a training: weights, their moving average, optimiser, early stopping; in a folder or a bucket.

    checkpoints/<name>.safetensors         the newest state
    checkpoints/<name>-best.safetensors    averaged weights of the best validation

It does not know how many workers wrote it or how they shared the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.storage import Store
from lora_diffusion.training.checkpoint import SavedTensors, differences, pieces, unpack, with_prefix
from lora_diffusion.training.distributed import copy_whole, like_parameter

_PROGRESS = ("step", "done", "best", "best_step", "worse")


class TrainingState:
    """`best`: the lowest score of a validation, at `best_step`; `worse`: validations since; `done`: nothing is left to do."""

    def __init__(
        self,
        name: str,
        store: Store,
        parameters: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        config: Any,
        identity: dict[str, Any],
    ) -> None:
        self.store, self.parameters, self.optimizer = store, parameters, optimizer
        self.file, self.best_file = f"checkpoints/{name}.safetensors", f"checkpoints/{name}-best.safetensors"
        self.identity = json.loads(json.dumps({"loop": asdict(config), **identity}))
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.step, self.done = 0, False
        self.best, self.best_step, self.worse = [math.inf], 0, 0

    @torch.no_grad()
    def advance(self, decay: float) -> None:
        """One step was made: let the average follow, faster at the start."""
        self.step += 1
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def judge(self, score: list[float], patience: int) -> bool:
        """Whether this validation is the best so far; without a better one for too long, the training is done.

        Of `score` the lowest is the best, a tie is decided by the next number.
        """
        if score < self.best:
            self.best, self.best_step, self.worse = score, self.step, 0
            return True
        self.worse += 1
        self.done = 0 < patience <= self.worse
        return False

    def save(self, write: bool) -> None:
        """All workers call it, since parts of a split tensor are gathered, one tensor at a time; one of them writes."""
        tensors = with_prefix("model", self.parameters) | with_prefix("average", self.average)
        for name, parameter in self.parameters.items():
            moments = {key: torch.as_tensor(value) for key, value in sorted(self.optimizer.state[parameter].items())}
            tensors |= with_prefix(f"optimizer.{name}", moments)
        progress = {key: getattr(self, key) for key in _PROGRESS}
        self._write(self.file, tensors, progress, write)

    def save_best(self, write: bool) -> None:
        """Call it inside `averaged`."""
        self._write(self.best_file, self.parameters, {"step": self.step}, write)

    def _write(self, file: str, tensors: dict[str, Tensor], meta: dict[str, Any], write: bool) -> None:
        parts = pieces(tensors, {**meta, "identity": self.identity})
        if write:
            self.store.write_parts(file, parts)
        else:
            for _ in parts:  # the others give their share of each
                pass

    def load_best(self) -> dict[str, Tensor]:
        saved = unpack(self.store, self.best_file)
        if saved is None:
            raise ValueError(f"{self.store.uri}/{self.best_file} is gone: delete {self.file} beside it to train anew")
        return saved[0]

    def restore(self) -> int:
        """Continue from the newest state; returns its step, 0 if there is none. Of a training that is done only this is read.

        Raises ValueError if it does not fit.
        """
        saved = SavedTensors.find(self.store, self.file)
        if saved is None:
            return 0
        meta = saved.meta
        with saved.readable():
            there, progress = dict(meta["identity"]), {key: meta[key] for key in _PROGRESS}
        if lines := differences(there, self.identity):
            raise ValueError(
                f"{self.store.uri}/{self.file} was trained with other settings:\n"
                + "".join(f"  {line}\n" for line in lines)
                + "Set them back to resume, or choose another output to begin anew."
            )
        # In the order of the file, which is the same for all workers: splitting a tensor is done by all of them together.
        for key, tensor in saved if not progress["done"] else ():  # then the best weights are what is wanted
            kind, _, name = key.partition(".")
            name, _, moment = name.rpartition(".") if kind == "optimizer" else (name, "", "")
            with saved.readable():
                parameter = self.parameters[name]
                if kind == "optimizer":
                    self.optimizer.state[parameter][moment] = like_parameter(tensor, parameter)
                elif tensor.shape == parameter.shape:
                    copy_whole(parameter if kind == "model" else self.average[name], tensor)
                else:
                    raise ValueError(f"{key} is {tuple(tensor.shape)}, the model's {tuple(parameter.shape)}")
        for key, value in progress.items():
            setattr(self, key, value)
        return self.step

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
