"""The state of a training: weights, their moving average, optimiser, early stopping; in a folder or a bucket.

    checkpoints/<name>.safetensors         the newest state
    checkpoints/<name>-best.safetensors    averaged weights of the best validation

Each file is written whole or not at all. It does not know how many workers wrote it or how they shared the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_diffusion.checkpoint import strip_prefix, with_prefix
from lora_diffusion.storage import Store
from lora_diffusion.synthesis.training.distributed import copy_whole, like_parameter, whole

_FREE_TO_CHANGE = ("checkpoint_every", "log_every")  # on resume: they change no loss
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
        """All workers call it, since parts of a split tensor are gathered; one of them writes."""
        tensors = with_prefix("model", _whole(self.parameters)) | with_prefix("average", _whole(self.average))
        for name, parameter in self.parameters.items():
            moments = {key: torch.as_tensor(value) for key, value in sorted(self.optimizer.state[parameter].items())}
            tensors |= with_prefix(f"optimizer.{name}", _whole(moments))
        if write:
            progress = {key: getattr(self, key) for key in _PROGRESS}
            self.store.write(self.file, pack(tensors, {**progress, "identity": self.identity}))

    def save_best(self, write: bool) -> None:
        """Call it inside `averaged`."""
        tensors = _whole(self.parameters)
        if write:
            self.store.write(self.best_file, pack(tensors, {"step": self.step, "identity": self.identity}))

    def load_best(self) -> dict[str, Tensor]:
        saved = unpack(self.store, self.best_file)
        assert saved is not None, "a run ends with a validation"
        return saved[0]

    def restore(self) -> int:
        """Continue from the newest state; returns its step, 0 if there is none. Raises ValueError if it does not fit."""
        saved = unpack(self.store, self.file)
        if saved is None:
            return 0
        tensors, meta = saved
        if lines := differences(meta["identity"], self.identity):
            raise ValueError(
                f"{self.store.uri}/{self.file} was trained with other settings:\n"
                + "".join(f"  {line}\n" for line in lines)
                + "Set them back to resume, or choose another output to begin anew."
            )
        for name, parameter in self.parameters.items():
            copy_whole(parameter, tensors[f"model.{name}"])
            copy_whole(self.average[name], tensors[f"average.{name}"])
            # sorted, for safetensors gives names in another order in each process: splitting is done by all workers
            # together, and one that took the second moment for the first would go on with the wrong numbers
            moments = sorted(strip_prefix(f"optimizer.{name}", tensors).items())
            self.optimizer.state[parameter] = {key: like_parameter(value, parameter) for key, value in moments}
        for key in _PROGRESS:
            setattr(self, key, meta[key])
        return self.step

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


def pack(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """A safetensors file with `meta`, JSON, in its header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(save(plain, metadata={"meta": json.dumps(meta)}))


def unpack(store: Store, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Inverse of `pack`, or None where there is no such file. Raises ValueError if it is damaged."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load(data), json.loads(header["__metadata__"]["meta"])
    except Exception as error:
        raise ValueError(
            f"{store.uri}/{name} cannot be read ({type(error).__name__}: {error}). Delete it: the same command makes it anew"
        ) from error


def differences(there: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What of two settings is not the same, one line each: `vae.kl_weight: 0.5 there, 0.1 now`."""
    lines = []
    for key in sorted({*there, *now} - set(_FREE_TO_CHANGE)):
        a, b = there.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} there, {b!r} now")
    return lines
