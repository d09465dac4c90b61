"""Training a base model for what will be done with it: that fine-tuning a LoRA on it finds a new person soon.

Stable Diffusion has seen so many faces that a small LoRA suffices to name one. `tiny-sd` has not:
people of its own training split are fine-tuned by the recipe of the corpus, over and over, and every step moves
the base model such that the LoRAs, as far as they have come, draw *other* photos of their person better, and that the base
without a LoRA goes on drawing what the words say. That is first-order meta-learning along the inner trajectory (FOMAML,
Finn et al. 2017, arXiv:1703.03400, with the gradient taken at all of its points and applied to the base).

The A that all LoRAs share is trained along, from the start that is given. It is not kept: `lora/shared_start.py` learns a
better one on the model that comes out.

Axes: M photos, P people of V photos each, K people fine-tuned at the same time, n photos of each in one step, D photos
drawn without a LoRA, S token positions, W captions of a photo, N vector length, B length of its B part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import attention, autocast
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import Store, open_store
from lora_diffusion.training.checkpoint import (
    differences,
    load_optimizer_tensors,
    optimizer_tensors,
    pieces,
    strip_prefix,
    unpack,
    with_prefix,
)
from lora_diffusion.training.schedule import warmup_cosine
from lora_diffusion.world.base.adaptation_faces import AdaptationFaces
from lora_diffusion.world.base.training import loss_weights

CHECKPOINT = "checkpoints/adaptation.safetensors"
_WARM_UP_STEPS = 8  # before a step is captured as a CUDA graph


@dataclass(frozen=True)
class AdaptationConfig:
    """A person is fine-tuned for as many steps as the recipe says, then another begins; K of them are under way.

    The defaults made `tiny-sd`, in six minutes on an H200. On CPUs such a run takes hours: fewer people and photos.
    """

    steps: int = 2845
    people_per_step: int = 64
    other_photos: int = 2  # of each person and step: not those that its LoRA is fine-tuned on
    held_back: int = 3  # photos of each person that are such others
    described_photos: int = 192  # of each step: drawn from their full description, without a LoRA
    learning_rate: float = 1e-3  # of the base model
    learning_rate_A: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    warmup_steps: int = 200
    ema_decay: float = 0.995
    checkpoint_every: int = 200
    seed: int = 0


class BaseAdapter:
    """One training of `base`, in place; `run` goes on from the checkpoint in `folder`, if there is one.

    Raises:
        ValueError: too few photos of each person, or a checkpoint of another configuration.
    """

    def __init__(
        self,
        base: BaseModel,
        layout: LoRALayout,
        start_N: Tensor,
        faces: AdaptationFaces,
        config: AdaptationConfig,
        recipe: FinetuneConfig,
        folder: Path | None = None,
    ) -> None:
        if not config.other_photos <= config.held_back < faces.photos_each:
            raise ValueError(
                f"{faces.photos_each} photos of each person, {config.held_back} held back, {config.other_photos} of those "
                "in a step: some must be left to fine-tune on, and a step cannot take more than are held back"
            )
        self.base, self.layout, self.faces = base, layout, faces
        self.store = None if folder is None else open_store(folder)
        self.config, self.recipe = config, recipe
        device = base.device
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler, device)
        self.loss_weights = loss_weights(base.scheduler, torch.arange(len(self.schedule))).to(device)
        self.bank = LoRABank(base.unet, layout)
        is_B = layout.mask_B()
        self.place_A, self.place_B = ((~is_B).nonzero()[:, 0].to(device), is_B.nonzero()[:, 0].to(device))
        self.network = [*base.unet.parameters(), *base.text_encoder.parameters()]
        for parameter in self.network:
            parameter.requires_grad_(True)
        self.A = start_N.to(device)[self.place_A].clone().requires_grad_()
        self.ema = [parameter.detach().clone() for parameter in self.network]
        self.decay = torch.zeros((), device=device)
        groups = [
            {"params": self.network, "lr": torch.tensor(config.learning_rate, device=device)},
            {"params": [self.A], "lr": torch.tensor(config.learning_rate_A, device=device), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        # the people under way: who, how many steps, in which order of photos; their B, and its moments in AdamW
        K = config.people_per_step
        self.B_KB, self.first_KB, self.second_KB = (torch.zeros(K, len(self.place_B), device=device) for _ in range(3))
        self.rate_of_age = torch.tensor([recipe.rate(age) for age in range(recipe.steps)], device=device)
        self.rng = np.random.default_rng(config.seed)
        self.people_K = self.rng.integers(faces.people, size=K)
        self.age_K = self.rng.integers(recipe.steps, size=K)
        self.order_KV = np.stack([self.rng.permutation(faces.photos_each) for _ in range(K)])
        self.generator = torch.Generator(device).manual_seed(config.seed)
        sizes = {
            "own": (K, recipe.batch_size),
            "other": (K, config.other_photos),
            "described": (1, config.described_photos),
        }
        self.random = {
            name: (torch.empty(*size, *base.latent_shape, device=device), torch.empty(size[0], 1, device=device))
            for name, size in sizes.items()
        }
        self.step = 0
        if self.store is not None and (saved := unpack(self.store, CHECKPOINT)) is not None:
            self._restore(*saved)

    def run(self, report: Callable[[int, dict[str, float]], None] = lambda step, values: None) -> None:
        """Train to the end and put the averaged weights into the base; `report(step, values)` after every step.

        values: losses of the described photos, and of other photos of people who have just begun (`young`) and are
        nearly done (`old`), where there are any. `old` is no measure of new people: the same few photos come round.
        """
        replay: Callable[[], Tensor] | None = None
        inputs: dict[str, Tensor] = {}
        first, on_gpu = self.step, self.base.device.type == "cuda"
        while self.step < self.config.steps:
            values = self._next()
            if not inputs:
                inputs = {name: value.to(self.base.device) for name, value in values.items()}
            for name, value in values.items():
                inputs[name].copy_(value)
            if on_gpu and self.step - first >= _WARM_UP_STEPS:
                replay = replay or self._captured(inputs)
                losses = replay()
            else:
                losses = self._aside(inputs) if on_gpu else self._work(inputs)
            self.step += 1
            if self.store is not None and self.step % self.config.checkpoint_every == 0:
                self._save(self.store)
            report(self.step, self._summary(losses, values["age_K"]))
        with torch.no_grad():
            for parameter, average in zip(self.network, self.ema, strict=True):
                parameter.copy_(average).requires_grad_(False)

    def _summary(self, losses: Tensor, age_K: Tensor) -> dict[str, float]:
        other_K, last = losses[:-1].cpu(), self.recipe.steps * 5 // 6
        groups = {"young": other_K[age_K < 5], "old": other_K[age_K >= last], "described": losses[-1:]}
        return {name: float(values.mean()) for name, values in groups.items() if len(values)}

    def _aside(self, inputs: dict[str, Tensor]) -> Tensor:
        """`_work` on another stream than the default one, as what is captured later must have been."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            losses = self._work(inputs)
        current.wait_stream(stream)
        return losses

    def _captured(self, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        """`_work` as a CUDA graph: one launch instead of thousands, which small models wait for."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self._work(inputs)

        def replay() -> Tensor:
            graph.replay()
            return losses

        return replay

    def _next(self) -> dict[str, Tensor]:
        """All that a step needs to be told: who begins anew, photos, noise, timesteps, learning rates."""
        config, V = self.config, self.faces.photos_each
        for k in (self.age_K >= self.recipe.steps).nonzero()[0]:
            self.people_K[k], self.age_K[k] = self.rng.integers(self.faces.people), 0
            self.order_KV[k] = self.rng.permutation(V)
        own = V - config.held_back
        place_Kn = (self.age_K[:, None] * self.recipe.batch_size + np.arange(self.recipe.batch_size)) % own
        shuffled_KH = np.argsort(self.rng.random((len(self.age_K), config.held_back)), 1)
        first_K1 = self.people_K[:, None] * V
        values = {
            "own_Kn": first_K1 + np.take_along_axis(self.order_KV, place_Kn, 1),
            "other_Kn": first_K1 + np.take_along_axis(self.order_KV, own + shuffled_KH[:, : config.other_photos], 1),
            "described_D": self.rng.integers(len(self.faces.latents), size=config.described_photos),
            "caption_D": self.rng.integers(self.faces.described_tokens.shape[1], size=config.described_photos),
            "age_K": self.age_K.copy(),
        }
        self.age_K += 1
        for noise, place in self.random.values():  # outside of the step, so that a captured one draws none
            noise.normal_(generator=self.generator)
            place.uniform_(generator=self.generator)
        share = warmup_cosine(self.step, config.steps, config.warmup_steps)
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.learning_rate_A), strict=True
        ):
            group["lr"].fill_(rate * share)
        self.decay.fill_(1 - min(config.ema_decay, (1 + self.step) / (10 + self.step)))
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}

    def _work(self, i: dict[str, Tensor]) -> Tensor:
        """One step, on the device alone; losses (K + 1,): of each person's other photos, and of the described ones."""
        self._fine_tune(i["own_Kn"], i["age_K"])
        scenes, described = self.faces.scene_tokens, self.faces.described_tokens
        vectors_KN = self._vectors(self.A, self.B_KB)
        other_K = self._loss("other", i["other_Kn"], scenes[i["other_Kn"]], vectors_KN)
        plain_1 = self._loss(
            "described", i["described_D"][None], described[i["described_D"], i["caption_D"]][None], None
        )
        (other_K.mean() + plain_1[0]).backward()
        torch.nn.utils.clip_grad_norm_([*self.network, self.A], self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.network, strict=True):
                average.lerp_(parameter, self.decay)
        return torch.cat([other_K.detach(), plain_1.detach()])

    def _fine_tune(self, own_Kn: Tensor, age_K: Tensor) -> None:
        """One step of the recipe for K people: AdamW by hand, since each is at an age and a rate of its own."""
        recipe, (first, second) = self.recipe, self.recipe.betas
        began_K1 = (age_K > 0)[:, None].float()
        for state_KB in (self.B_KB, self.first_KB, self.second_KB):
            state_KB.mul_(began_K1)
        B_KB = self.B_KB.detach().requires_grad_()
        vectors_KN = self._vectors(self.A.detach(), B_KB)
        loss_K = self._loss("own", own_Kn, self.faces.scene_tokens[own_Kn], vectors_KN, learn_words=False)
        (grad_KB,) = torch.autograd.grad(loss_K.sum(), [B_KB])
        with torch.no_grad():
            if recipe.max_grad_norm is not None:
                norm_K1 = torch.linalg.vector_norm(grad_KB, dim=1, keepdim=True)
                grad_KB = grad_KB * (recipe.max_grad_norm / (norm_K1 + 1e-6)).clamp(max=1)
            self.first_KB.lerp_(grad_KB, 1 - first)
            self.second_KB.mul_(second).add_((1 - second) * grad_KB.square())
            rate_K1, count_K1 = self.rate_of_age[age_K][:, None], (age_K + 1)[:, None].float()
            root_KB = (self.second_KB / (1 - second**count_K1)).sqrt() + recipe.epsilon
            self.B_KB.mul_(1 - rate_K1 * recipe.weight_decay)
            self.B_KB.sub_(rate_K1 * (self.first_KB / (1 - first**count_K1)) / root_KB)

    def _vectors(self, A: Tensor, B_KB: Tensor) -> Tensor:
        vectors_KN = torch.zeros(len(B_KB), self.layout.size, device=A.device)
        return vectors_KN.index_copy(1, self.place_A, A.expand(len(B_KB), -1)).index_copy(1, self.place_B, B_KB)

    def _loss(
        self, which: str, index_Kn: Tensor, tokens_KnS: Tensor, vectors_KN: Tensor | None, learn_words: bool = True
    ) -> Tensor:
        """Loss (K,) of drawing these photos: the recipe's with LoRAs, that of base training without."""
        base, n, total = self.base, index_Kn.shape[1], len(self.schedule)
        noise_KnCHW, place_K1 = self.random[which]
        low, high = (self.recipe.timestep_range or (0, total)) if vectors_KN is not None else (0, total)
        u_Kn = (place_K1 + torch.arange(n, device=base.device) / n) % 1  # stratified within each person
        timesteps_Kn = low + (u_Kn * (high - low)).long().clamp(max=high - low - 1)
        x_KnCHW, target_KnCHW = self.schedule.add_noise(self.faces.latents[index_Kn], noise_KnCHW, timesteps_Kn)
        active = nullcontext() if vectors_KN is None else self.bank.active(vectors_KN, n, train_A=learn_words)
        with active, attention(base, self.recipe, base.latent_shape), autocast(base, self.recipe):
            with torch.set_grad_enabled(learn_words):
                text_BSD = base.text_encoder(tokens_KnS.flatten(0, 1).long())[0]
            x_BCHW, t_B = x_KnCHW.flatten(0, 1), timesteps_Kn.flatten()
            prediction = base.unet(x_BCHW, t_B, encoder_hidden_states=text_BSD, return_dict=False)[0]
        error_KnCHW = (prediction.float().view_as(target_KnCHW) - target_KnCHW).square()
        if vectors_KN is not None:
            return (self.faces.face[index_Kn][:, :, None] * error_KnCHW).mean((1, 2, 3, 4))
        return (self.loss_weights[timesteps_Kn] * error_KnCHW.mean((2, 3, 4))).mean(1)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """Everything but the optimiser's moments, as it lies on the device."""
        lists = {"network": self.network, "ema": self.ema}
        tensors = {f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}
        return tensors | {"A": self.A, "B": self.B_KB, "first": self.first_KB, "second": self.second_KB}

    def _save(self, store: Store) -> None:
        people = {name: getattr(self, name) for name in ("people_K", "age_K", "order_KV")}
        tensors = self._state() | with_prefix("optimizer", optimizer_tensors(self.optimizer))
        tensors |= {name: torch.from_numpy(value) for name, value in people.items()}
        meta = {"step": self.step, "config": self._identity(), "rng": self.rng.bit_generator.state}
        tensors["generator"] = self.generator.get_state()
        store.write_parts(CHECKPOINT, pieces(tensors, meta))

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if lines := differences(meta["config"], self._identity()):
            raise ValueError(
                f"the checkpoint was made with other settings: {'; '.join(lines)}. Use the same to resume, or another "
                "folder to start anew"
            )
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(tensors[name])
        load_optimizer_tensors(self.optimizer, strip_prefix("optimizer", tensors))
        for name in ("people_K", "age_K", "order_KV"):
            setattr(self, name, tensors[name].numpy())
        self.generator.set_state(tensors["generator"])
        self.rng.bit_generator.state = meta["rng"]
        self.step = int(meta["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "betas": list(self.config.betas),
            "layout_id": self.layout.layout_id,
            "people": self.faces.people,
        }
