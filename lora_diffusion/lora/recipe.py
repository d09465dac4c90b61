"""The recipe of fine-tuning: every setting that decides what a LoRA becomes."""

import math
from dataclasses import dataclass
from typing import Literal

from lora_diffusion.training.schedule import cosine


@dataclass(frozen=True)
class FinetuneConfig:
    """How a LoRA is fine-tuned. Defaults suit LoRAs on the attention of `tiny-sd`, from a random start.

    The recipes of the corpora, far better, are in `configs/tiny.yaml` and `configs/sd15.yaml`.
    """

    steps: int = 80  # optimiser steps
    batch_size: int = 4  # photos of each identity in a step
    learning_rate: float = 4e-2  # highest rate of AdamW
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # cosine decays to 0
    warmup_steps: int = 0  # the rate rises from 0 over so many steps
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    epsilon: float = 1e-8  # of AdamW
    weight_decay: float = 1e-2  # of AdamW
    max_grad_norm: float | None = 1.0  # for each identity
    train_A: bool = True  # False: A stays as it starts, the same for all, and only B is learned
    average_last: int = 0  # the LoRA is the mean of the last so many iterates; 0: the last one
    update_scale: float = 1.0  # the LoRA is the start and so many times what was learned; above 1 it extrapolates
    seed: int = 0  # of noise, timesteps and the start
    common_random_numbers: bool = True  # False: each identity has its own A at the start, noise and timesteps
    instance_prompt: str = "a photo of sks person"  # for photos without a caption
    class_prompt: str = "a photo of a person"  # of the class images, for prior preservation
    prior_weight: float = 1.0  # of the class images; without any it has no effect
    prior_batch_size: int = 1  # class images of each identity in a step
    timesteps: Literal["uniform", "stratified"] = "uniform"  # stratified spreads a step's timesteps evenly
    timestep_range: tuple[int, int] | None = None  # [low, high); None: all of the base model
    face_weight: float = 1.0  # of a place in the loss where the photo's face is; elsewhere it is 1. Needs face_boxes
    min_snr_gamma: float | None = None  # weight min(SNR, gamma) / SNR of a timestep; null: none
    autocast: Literal["off", "bfloat16"] = "off"  # over a float32 base; a bfloat16 base needs none
    channels_last: bool = False  # memory layout of the base; faster on most machines
    compile: bool = False  # torch.compile of the base
    gradient_checkpointing: bool = False  # less memory, a third slower

    def __post_init__(self) -> None:
        lowest = {"steps": 0, "batch_size": 1, "warmup_steps": 0, "average_last": 0, "prior_batch_size": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("learning_rate", "epsilon", "max_grad_norm", "min_snr_gamma", "face_weight", "update_scale"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if self.average_last > self.steps > 0:
            raise ValueError(f"average_last is {self.average_last}, more than the {self.steps} steps")
        if not self.train_A and not self.common_random_numbers:
            raise ValueError(
                "train_A: false freezes one A for all, but common_random_numbers: false gives each its own"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * cosine(progress)
