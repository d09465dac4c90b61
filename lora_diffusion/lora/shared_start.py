"""One start for all fine-tunings, learned from a population before anybody is fine-tuned.

A LoRA's A chooses which channels of a layer's input count, its B what they change. Which channels tell people apart is the
same for all people, so A is learned once. P people get LoRAs that share one A, all trained at the
same time (multi-task learning); A is kept, the B's are thrown away. Fine-tuning from there needs fewer steps, and with
`train_A: false` the update is linear in the vector and the space of vectors is smooth.

The people must be neither those of the corpus nor held out: they are those that the base model was trained on.

Axes: P people, K people of one step, n photos of each, N vector length, A / B length of its A and B parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diffusion.lora import formats
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import attention, autocast, initial_vectors
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.objective import NoiseSchedule
from lora_diffusion.lora.photo_data import PersonPhotos, PhotoData
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.models.stable_diffusion import ASSETS, BaseModel
from lora_diffusion.places import local_place
from lora_diffusion.training.schedule import warmup_cosine

EMBEDDED = {"tiny-start": ASSETS / "tiny-start" / "vector.safetensors"}


@dataclass(frozen=True)
class StartConfig:
    """How the start is learned. A person's B is trained in every (P / K)-th step."""

    steps: int = 900
    people_per_step: int = 32
    photos_per_person: int = 2
    learning_rate_A: float = 5e-3
    learning_rate_B: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2  # of B
    max_grad_norm: float = 1.0  # of each person's B
    warmup_steps: int = 10
    seed: int = 0


def learn_start(
    base: BaseModel,
    layout: LoRALayout,
    people: Sequence[PersonPhotos],
    config: StartConfig | None = None,
    recipe: FinetuneConfig | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Tensor:
    """The start vector (N,), float32: A as learned over `people`, B zero, so that it is the base model.

    The loss is that of fine-tuning by `recipe`: its timesteps, its weights of places, its precision.
    `report(step, loss)` is called after each step. Same arguments, same bits.

    Raises:
        ValueError: fewer people than one step takes, or somebody with fewer photos.
    """
    config, recipe = config or StartConfig(), recipe or FinetuneConfig()
    K, n = config.people_per_step, config.photos_per_person
    if len(people) < K or min(len(person.pixels) for person in people) < n:
        raise ValueError(f"{len(people)} people: a step takes {K}, with at least {n} photos each")
    groups = [people[i : i + K] for i in range(0, len(people) - K + 1, K)]
    data = [PhotoData(base, group, replace(recipe, batch_size=n), class_latents=None) for group in groups]
    schedule, bank = NoiseSchedule.from_scheduler(base.scheduler, base.device), LoRABank(base.unet, layout)
    low, high = recipe.timestep_range or (0, len(schedule))
    generator = torch.Generator().manual_seed(config.seed)
    is_B = layout.mask_B().to(base.device)
    start_N = initial_vectors(layout, config.seed)[0].to(base.device)
    shared_A = start_N[~is_B].requires_grad_()
    own_KB = [torch.zeros(K, int(is_B.sum()), device=base.device, requires_grad=True) for _ in groups]
    rates = (config.learning_rate_A, config.learning_rate_B)
    optimizer = torch.optim.AdamW(
        [{"params": [shared_A], "weight_decay": 0.0}, {"params": own_KB, "weight_decay": config.weight_decay}],
        betas=config.betas,
    )
    for step in range(config.steps):
        group = step % len(groups)
        x0_KnCHW, prompts_KnSD, weights_Kn1HW = data[group].draw(generator)
        timesteps_Kn = torch.randint(low, high, (K, n), generator=generator).to(base.device)
        noise_KnCHW = torch.randn(x0_KnCHW.shape, generator=generator).to(base.device)
        x_KnCHW, target_KnCHW = schedule.add_noise(x0_KnCHW, noise_KnCHW, timesteps_Kn)
        vectors_KN = start_N.expand(K, -1).masked_scatter(~is_B, shared_A.expand(K, -1))
        vectors_KN = vectors_KN.masked_scatter(is_B, own_KB[group])
        with bank.active(vectors_KN, n), attention(base, recipe, data[group].shape):
            with autocast(base, recipe):
                x_BCHW = x_KnCHW.flatten(0, 1).to(base.dtype)
                conditioning = base.conditioning(prompts_KnSD.flatten(0, 1), x_BCHW)
                prediction = base.unet(x_BCHW, timesteps_Kn.flatten(), **conditioning, return_dict=False)[0]
            error_KnCHW = (prediction.float().view_as(target_KnCHW) - target_KnCHW).square()
            loss_K = (weights_Kn1HW * error_KnCHW).mean((1, 2, 3, 4))
            loss_K.sum().backward()
        grad_A, grad_KB = shared_A.grad, own_KB[group].grad
        assert grad_A is not None
        assert grad_KB is not None
        grad_A /= K
        norm_K1 = torch.linalg.vector_norm(grad_KB, dim=1, keepdim=True)
        grad_KB *= (config.max_grad_norm / (norm_K1 + 1e-6)).clamp(max=1)
        for part, rate in zip(optimizer.param_groups, rates, strict=True):
            part["lr"] = rate * warmup_cosine(step, config.steps, config.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            report(step, float(loss_K.detach().mean()))
    return start_N.detach().masked_scatter(~is_B, shared_A.detach()).cpu()


def load_start(name_or_path: str, layout: LoRALayout, base: BaseModel | None = None) -> Tensor:
    """A start vector (N,) by its file, or a shipped one by its name (`tiny-start`).

    Raises `ValueError` if it does not fit the layout, or says that it was learned with another base model.
    """
    try:
        path = EMBEDDED.get(name_or_path) or local_place(name_or_path, "a start")
        learned_with = formats.read_metadata(path).get("base")
        if base is not None and learned_with and not base.knows(learned_with):
            raise ValueError(f"it was learned with base model {learned_with}, this one is {base.fingerprint}")
        own = formats.read_layout(path)
        if (own.entries, own.rank) != (layout.entries, layout.rank):
            raise ValueError(
                f"it was made for layout {own.layout_id} (rank {own.rank}, {len(own.entries)} layers), the one here is "
                f"{layout.layout_id} (rank {layout.rank}, {len(layout.entries)} layers)"
            )
        return formats.load(path, layout)
    except ValueError as error:
        raise ValueError(
            f"lora.start is {name_or_path}: {error}. Learn one for these layers with jobs/world/learn_start.py, or set "
            "lora.start=null for a random start"
        ) from error
