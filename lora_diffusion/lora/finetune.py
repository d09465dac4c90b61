"""DreamBooth LoRAs for K people at once, each exactly as if it were trained alone.

The recipe is that of weights2weights (arXiv:2406.09413, released code). Batching is exact by these rules:
losses are summed over identities, so no gradient is divided by K; gradients are clipped for each identity; random
numbers of an identity do not depend on its company; AdamW is element-wise, so one optimiser over the (K, N) matrix is
K optimisers. What does not change between steps, latents and prompt embeddings, is computed once.

Axes: K identities together, P photos of one person, n samples of one identity in one step (its photos, then class
images), N vector length, M learned part of it, C / H / W latents, S / D prompt embeddings.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule, RandomStreams, TimestepSampler, identity_seed
from lora_diffusion.lora.photo_data import PersonPhotos, PhotoData
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """K LoRAs. A diverged one is a row of zeros (the base model), with its loss as it was."""

    identities: tuple[str, ...]
    vectors_KN: NDArray[np.float32]
    loss_K: NDArray[np.float32]  # mean over the last tenth of the steps, on the person's photos; NaN without steps
    diverged_K: NDArray[np.bool_]
    steps: int
    seconds: float  # for all K together
    layout_id: str
    loss_history_SK: NDArray[np.float32] = field(repr=False)  # S steps


def initial_vectors(layout: LoRALayout, seed: int, K: int = 1) -> Tensor:
    """Start of fine-tuning (K, N), all rows equal: A as peft starts a linear layer (uniform ± 1/sqrt(I)), B zero."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for entry in layout.entries:
        A_KRI = torch.empty(1, layout.rank, entry.in_features)
        torch.nn.init.kaiming_uniform_(A_KRI[0], a=math.sqrt(5), generator=generator)
        matrices[entry.name] = A_KRI, torch.zeros(1, entry.out_features, layout.rank)
    return layout.join(matrices).repeat(K, 1)


def autocast(base: BaseModel, config: FinetuneConfig) -> AbstractContextManager[Any]:
    """bfloat16 over a float32 base, if `config` says so; for the forward pass."""
    return torch.autocast(base.device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")


def attention(
    base: BaseModel, config: FinetuneConfig, latent_shape: tuple[int, int, int]
) -> AbstractContextManager[Any]:
    """Plain attention for bfloat16 on CPUs: the backward of torch's fused kernel is 6 times slower there.

    It keeps every weight, memory by the square of the positions, so that large latents keep the fused kernel.
    """
    bfloat16 = base.dtype == torch.bfloat16 or config.autocast == "bfloat16"
    if base.device.type == "cpu" and bfloat16 and latent_shape[1] * latent_shape[2] <= 1024:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class Finetuner:
    """Fine-tunes people in batches on one frozen base model; make it once, call it for each batch.

    `class_pixels`, uint8 RGB (P, H, W, 3), are pictures of other people for prior preservation (DreamBooth,
    arXiv:2208.12242, equation 2), seen with `class_prompt`. They are encoded once, here.

    Raises:
        ValueError: the layout belongs to another model, or the base is in float16, whose gradients underflow.
    """

    def __init__(
        self,
        base: BaseModel,
        layout: LoRALayout,
        config: FinetuneConfig,
        class_pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        if base.dtype == torch.float16:
            raise ValueError("the base model is in float16, whose small gradients become zero: load it in bfloat16")
        self.base, self.layout, self.config = base, layout, config
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler, base.device)
        low, high = config.timestep_range or (0, len(self.schedule))
        if not 0 <= low < high <= len(self.schedule):
            raise ValueError(f"timestep_range is [{low}, {high}); it must lie within [0, {len(self.schedule)})")
        self.sample_timesteps = TimestepSampler(low, high, config.timesteps)
        if config.channels_last:
            base.unet.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.unet: Any = torch.compile(base.unet) if config.compile else base.unet
        self.bank = LoRABank(base.unet, layout)
        self.class_latents = None if class_pixels is None else base.encode_images(class_pixels)
        self.learned_M: Tensor | None = None  # where the learned part lies; None: everywhere
        if not config.train_A:
            self.learned_M = layout.mask_B().nonzero()[:, 0].to(base.device)

    def __call__(
        self, people: Sequence[PersonPhotos], start_vectors: Tensor | NDArray[np.float32] | None = None
    ) -> FinetuneResult:
        """One LoRA for each of `people`, from `start_vectors` (1, N) or (K, N), or from A random and B zero.

        Each comes out the same in whatever company, to float error; and the same call gives the same bits again.

        Raises:
            ValueError: no people, photos of different sizes, or start vectors of another layout.
        """
        started, config = time.perf_counter(), self.config
        start_KN = self._start(people, start_vectors)
        data = PhotoData(self.base, people, config, self.class_latents)
        begin_KM = start_KN if self.learned_M is None else start_KN[:, self.learned_M]
        learned_KM = begin_KM.clone().requires_grad_()
        optimizer = torch.optim.AdamW(
            [learned_KM], betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay, fused=True
        )
        streams = RandomStreams([person.identity for person in people], config.seed, config.common_random_numbers)
        alive_K = torch.isfinite(start_KN).all(1)
        mean_KM, losses = torch.zeros_like(learned_KM, requires_grad=False), []
        for step in range(config.steps):
            loss_K = self._backward(step, data, streams, start_KN, learned_KM)
            assert learned_KM.grad is not None
            norm_K1 = torch.linalg.vector_norm(learned_KM.grad, dim=1, keepdim=True)
            alive_K = alive_K & torch.isfinite(loss_K) & torch.isfinite(norm_K1[:, 0])
            if config.max_grad_norm is not None:
                learned_KM.grad *= (config.max_grad_norm / (norm_K1 + 1e-6)).clamp(max=1)
            # A diverged row stops here. Rows never meet, so it cannot have touched another.
            learned_KM.grad = torch.where(alive_K[:, None], learned_KM.grad, 0)
            optimizer.param_groups[0]["lr"] = config.rate(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_K)
            if step >= config.steps - config.average_last:
                mean_KM += learned_KM.detach() / config.average_last
        final_KM = mean_KM if config.average_last and config.steps else learned_KM.detach()
        vectors_KN = self._assemble(start_KN, torch.lerp(begin_KM, final_KM, config.update_scale))
        alive_K = alive_K & torch.isfinite(vectors_KN).all(1)
        vectors_KN = torch.where(alive_K[:, None], vectors_KN, 0)
        history_SK = torch.stack(losses).cpu().numpy() if losses else np.empty((0, len(people)), np.float32)
        return FinetuneResult(
            identities=tuple(person.identity for person in people),
            vectors_KN=vectors_KN.cpu().numpy(),
            loss_K=history_SK[-math.ceil(config.steps / 10) :].mean(0)
            if losses
            else np.full(len(people), np.nan, "f4"),
            diverged_K=~alive_K.cpu().numpy(),
            steps=config.steps,
            seconds=time.perf_counter() - started,
            layout_id=self.layout.layout_id,
            loss_history_SK=history_SK,
        )

    def _backward(
        self, step: int, data: PhotoData, streams: RandomStreams, start_KN: Tensor, learned_KM: Tensor
    ) -> Tensor:
        """One forward and backward of all identities; returns the loss on their photos (K,), detached."""
        config, base = self.config, self.base
        K, shape = len(learned_KM), data.shape
        x0_KnCHW, prompts_KnSD, weights_Kn1HW = data.batch(step)
        timesteps_Kn, noise_KnCHW = streams.draw(shape, data.sizes, self.sample_timesteps)
        timesteps_Kn, noise_KnCHW = timesteps_Kn.to(base.device), noise_KnCHW.to(base.device)
        x_KnCHW, target_KnCHW = self.schedule.add_noise(x0_KnCHW, noise_KnCHW, timesteps_Kn)
        x_BCHW = x_KnCHW.flatten(0, 1).to(base.dtype)
        if config.channels_last:
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        vectors_KN = self._assemble(start_KN, learned_KM)
        with self.bank.active(vectors_KN, sum(data.sizes), train_A=config.train_A), attention(base, config, shape):
            with autocast(base, config):
                conditioning = base.conditioning(prompts_KnSD.flatten(0, 1), x_BCHW)
                prediction = self.unet(x_BCHW, timesteps_Kn.flatten(), **conditioning, return_dict=False)[0]
            error_KnCHW = (prediction.float().view(K, -1, *shape) - target_KnCHW).square()
            error_Kn = (weights_Kn1HW * error_KnCHW).mean((2, 3, 4))
            if config.min_snr_gamma is not None:
                error_Kn = error_Kn * self.schedule.min_snr_weights(timesteps_Kn, config.min_snr_gamma)
            loss_K = error_Kn[:, : config.batch_size].mean(1)
            total_K = loss_K
            if data.has_prior:
                total_K = loss_K + config.prior_weight * error_Kn[:, config.batch_size :].mean(1)
            total_K.sum().backward()  # the sum, not the mean: an identity's gradient must not depend on K
        return loss_K.detach()

    def _start(self, people: Sequence[PersonPhotos], start_vectors: Tensor | NDArray[np.float32] | None) -> Tensor:
        """Start vectors (K, N), float32, on the base model's device."""
        if not people:
            raise ValueError("there is nobody to fine-tune: give at least one person")
        K, config = len(people), self.config
        if start_vectors is None and config.common_random_numbers:
            vectors = initial_vectors(self.layout, config.seed)
        elif start_vectors is None:
            seeds = [identity_seed(config.seed, person.identity) for person in people]
            vectors = torch.cat([initial_vectors(self.layout, seed) for seed in seeds])
        else:
            vectors = torch.as_tensor(start_vectors)
        self.layout.check(vectors)
        if len(vectors) not in (1, K):
            raise ValueError(
                f"there are {len(vectors)} start vectors for {K} people; give one for each, or one for all"
            )
        return vectors.to(self.base.device, torch.float32).expand(K, -1)

    def _assemble(self, start_KN: Tensor, learned_KM: Tensor) -> Tensor:
        """Vectors (K, N): the learned part laid over the start."""
        return learned_KM if self.learned_M is None else start_KN.index_copy(1, self.learned_M, learned_KM)
