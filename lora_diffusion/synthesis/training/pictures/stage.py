"""Embedding of one photo -> code -> LoRA -> a few sampling steps of the frozen base model -> picture -> recogniser, and back.

Reward fine-tuning through the sampler: the gradient goes through the last steps only (DRaFT-LV; Clark et al. 2023,
arXiv:2309.17400, section 4), here into a network that makes LoRAs instead of into one LoRA. Much of it alone is reward
hacking (heads that no longer turn, hair that melts), which the recogniser that teaches does not see: hence the anchors, and
a validation that also asks about prompts and fine detail.

Axes: B people, G pictures of each, V photos of one, Z code, N vector length, E embedding, R recognisers, C/H/W latents.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.faces.differentiable import Teacher
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.objective import NoiseSchedule
from lora_diffusion.lora.rendering import make_scheduler
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import LatentCodes
from lora_diffusion.synthesis.denoiser import Denoiser
from lora_diffusion.synthesis.diffusion import denoise
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.pictures.judging import Judge, fine_detail
from lora_diffusion.synthesis.training.pictures.people import People
from lora_diffusion.synthesis.training.pictures_config import PicturesConfig
from lora_diffusion.training.loop import Batch, Slots, Stage

JITTER = (0.04, 0.03, 2.0, 2.0)  # turn, log scale, shift right and down (px of the crop): standard deviations


class PictureStage(Stage):
    """Trains denoiser, linear guess and decoder of `synthesizer` at the settings that its folder recommends to draw with.

    Dropout is off: every step has other faces, prompts and noise.
    """

    selection_metrics: ClassVar[tuple[str, ...]] = ("score",)
    leaves_out_bad_batches: ClassVar[bool] = True

    def __init__(
        self, synthesizer: Synthesizer, base: BaseModel, people: People, config: PicturesConfig, recogniser: str
    ) -> None:
        super().__init__()
        self.denoiser, self.codes = synthesizer.denoiser, synthesizer.codes
        self.people, self.config, self.how = people, config, synthesizer.latent_sampling
        self.train_slots, self.validation_slots = people.train, people.validation
        self.diffusion, layout = synthesizer.diffusion, synthesizer.layout
        self._train_what_makes_vectors()
        # In a list: frozen networks that are no part of what is trained, split over workers or kept.
        self.frozen: list[Any] = [base, Teacher(FaceEmbedder(EmbedderConfig(recogniser, several_faces="largest")))]
        if config.weights.start:
            self.frozen += [part.requires_grad_(False) for part in deepcopy((self.denoiser, self.codes))]
        self.teacher.to(base.device)
        self.bank = LoRABank(base.unet, layout)
        varying = torch.zeros(layout.size, dtype=torch.bool)
        varying[self.codes.normaliser.varying.cpu()] = True
        self.train_A = bool((varying & ~layout.mask_B()).any())
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler, base.device)
        self.prompts_TSD = base.encode_prompts(people.prompts)
        self.judge = Judge(config, base, self.bank, self.teacher.embedder)
        self.photo_detail = fine_detail(self._decode(self._some_latents())).mean()
        self.sheet: NDArray[np.uint8] | None = None

    @property
    def base(self) -> BaseModel:
        base: BaseModel = self.frozen[0]
        return base

    @property
    def teacher(self) -> Teacher:
        teacher: Teacher = self.frozen[1]
        return teacher

    def _train_what_makes_vectors(self) -> None:
        self.denoiser.requires_grad_(True)
        guess, codes = self.denoiser.guess, self.codes
        if guess is not None:
            _make_parameter(guess, "weight_CZ")
        if self.how.guidance_scale == 1:  # nobody's face is never asked about: no gradient would come
            self.denoiser.no_face_W.requires_grad_(False)
        if isinstance(codes, LatentCodes):
            for part in (codes.vae.decoder, codes.vae.skip_out):
                if part is not None:
                    part.requires_grad_(True)
        elif "components_KM" in codes._buffers:
            _make_parameter(codes, "components_KM")

    def rate(self, name: str, parameter: Tensor, learning_rate: float) -> float:
        if not name.startswith("codes."):
            return 1.0
        return self.config.components_rate * float(parameter.detach().square().mean().sqrt()) / learning_rate

    def train(self, mode: bool = True) -> PictureStage:
        super().train(mode)
        self.denoiser.eval()
        self.codes.eval()
        return self

    # -- a step -------------------------------------------------------------------------------------------------------

    def inputs(self, slots: Slots) -> Batch:
        return {"slots": torch.from_numpy(slots)}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        c, shape = self.config, self.base.latent_shape
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        G, V = c.pictures_each, c.denoising_photos
        return {
            "code": torch.randn(count, self.denoiser.code_size, **where),
            "shown": torch.rand(count, **where),
            "prompt": torch.rand(count, G, **where),
            "start": torch.randn(count, G, *shape, **where),
            "jitter": torch.randn(count, G, 4, **where),
            "photo": torch.rand(count, V, **where),
            "noise": torch.randn(count, V, *shape, **where),
            "timestep": torch.rand(count, V, **where),
        }

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        slots_B = inputs["slots"].cpu().numpy()
        if not self.training:
            return self._validate(slots_B, draws["code"])
        c, w = self.config, self.config.weights
        counts_B = self.people.counts_P[slots_B]
        shown_B = _pick(draws["shown"], counts_B)
        condition_BE, targets_BRE = (t.to(self.base.device) for t in self.people.faces(slots_B, shown_B))
        codes_BZ = self._codes(condition_BE, draws["code"])
        vectors_BN = self._vectors(codes_BZ)
        numbers_BG, targets_BGE = self._scenes_and_targets(draws["prompt"], slots_B, shown_B, targets_BRE[:, 0])
        prompts = self.prompts_TSD[numbers_BG.ravel()]
        start_BN = self._vectors_of_start(condition_BE, draws["code"]) if w.start else None
        pictures, early, changes = self._draw(vectors_BN, prompts, draws["start"].flatten(0, 1), step, start_BN)
        boxes, points, seen = self.teacher.faces(pictures)
        B, G = len(slots_B), c.pictures_each
        jitter = c.jitter * draws["jitter"].flatten(0, 1) * torch.tensor(JITTER, device=pictures.device)
        found_BG = torch.from_numpy(seen).to(pictures.device).view(B, G)
        points[~seen] = _ANYWHERE * pictures.shape[-1]
        cosine_BG = (self.teacher(pictures, points, jitter) * targets_BGE.flatten(0, 1)).sum(1).view(B, G)
        identity_B = ((1 - cosine_BG) * found_BG).sum(1) / found_BG.sum(1).clamp(min=1)
        parts = {"identity": identity_B, "faces": found_BG.float().mean(1), **early}
        parts["code_length"] = codes_BZ.square().mean(1)
        parts["sharpness"] = F.relu(1 - fine_detail(pictures) / self.photo_detail).view(B, G).mean(1)
        if w.outside:
            parts["outside"] = self._outside(changes, boxes, seen, pictures.shape[-1]).view(B, G).mean(1)
        if w.denoising:
            parts["denoising"] = self._denoising(vectors_BN, slots_B, shown_B, draws)
        weights = vars(w)
        # the vectors' sum, times 0: all parameters get a gradient, and the workers agree, even where no picture has a face
        loss_B = vectors_BN.sum(1) * 0.0
        for name, part_B in parts.items():
            if weights.get(name):
                loss_B = loss_B + weights[name] * part_B
        return loss_B, {name: part_B.detach() for name, part_B in parts.items()}

    def _codes(self, condition_BE: Tensor, white_BZ: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        how = self.how
        return denoise(
            denoiser or self.denoiser, how.temperature * self.diffusion.noise(white_BZ), condition_BE, how.guidance_scale,
            how.num_inference_steps, diffusion=self.diffusion,
        )  # fmt: skip

    def _vectors(self, codes_BZ: Tensor) -> Tensor:
        return self.codes.decode(codes_BZ, self.how.deviation_scale)

    @torch.no_grad()
    def _vectors_of_start(self, condition_BE: Tensor, white_BZ: Tensor) -> Tensor:
        denoiser, codes = self.frozen[2:]
        vectors_BN: Tensor = codes.decode(self._codes(condition_BE, white_BZ, denoiser), self.how.deviation_scale)
        return vectors_BN

    def _scenes_and_targets(
        self, draws_BG: Tensor, slots_B: Slots, shown_B: Slots, means_BE: Tensor
    ) -> tuple[NDArray[np.int64], Tensor]:
        """Prompt of each picture (B, G), and what its embedding should be (B, G, E)."""
        matched, G = self.config.matched, draws_BG.shape[1]
        means_BGE = means_BE[:, None].expand(-1, G, -1)
        if not matched:  # prompts of anybody's photos, as often as they come
            anybody = self.people.prompt_T[(draws_BG.cpu().numpy() * len(self.people.prompt_T)).astype(int)]
            return anybody, means_BGE
        photos_BG = self._others(draws_BG, slots_B, shown_B)
        theirs_BGE = self.people.embeddings(slots_B, photos_BG).to(means_BE.device)
        return self.people.prompts_of(slots_B, photos_BG), F.normalize(
            torch.lerp(means_BGE, theirs_BGE, matched), dim=2
        )

    def _others(self, draws_BV: Tensor, slots_B: Slots, shown_B: Slots) -> NDArray[np.int64]:
        """Photos (B, V) of each person, never the one shown."""
        counts_B = self.people.counts_P[slots_B][:, None]
        others: NDArray[np.int64] = (shown_B[:, None] + 1 + _pick(draws_BV, counts_B - 1)) % counts_B
        return others

    def _draw(
        self, vectors_BN: Tensor, prompts: Tensor, noise: Tensor, step: int, start_BN: Tensor | None
    ) -> tuple[Tensor, Batch, list[Tensor]]:
        """Pictures (B * G, 3, H, W); changes of the prediction in an early step, (B,) each; in those with gradient (B * G, h, w)."""
        c, w, base, G = self.config, self.config.weights, self.base, self.config.pictures_each
        scheduler = make_scheduler(base, "ddim")
        scheduler.set_timesteps(c.num_inference_steps)
        prompts, x = prompts.to(base.dtype), noise * scheduler.init_noise_sigma
        parts: Batch = {"high_noise": torch.zeros(len(vectors_BN), device=x.device)}
        changes = []
        early = step % max(1, c.num_inference_steps // 3)
        for i, t in enumerate(scheduler.timesteps):
            last = i >= c.num_inference_steps - c.gradient_steps
            to_base = (last and w.outside > 0) or (i == early and w.high_noise > 0)
            to_start = i == early and start_BN is not None
            model_in = scheduler.scale_model_input(x, t).to(base.dtype)
            with torch.set_grad_enabled(last or to_base or to_start):
                given = vectors_BN if last or to_base or to_start else vectors_BN.detach()
                out = self._predict(given, model_in if last else model_in.detach(), t, prompts, G)
            if to_start:
                assert start_BN is not None
                with torch.no_grad():
                    of_start = self._predict(start_BN, model_in, t, prompts, G)
                parts["start"] = (out - of_start).square().mean((1, 2, 3)).view(-1, G).mean(1)
            if to_base:
                with torch.no_grad(), self._autocast():
                    plain = base.unet(model_in, t, **base.conditioning(prompts, model_in)).sample.float()
                change = (out - plain).square()
                if i == early:
                    parts["high_noise"] = change.mean((1, 2, 3)).view(-1, G).mean(1)
                if last:
                    changes.append(change.mean(1))
            x = scheduler.step(out if last else out.detach(), t, x).prev_sample
        return self._decode(x), parts, changes

    def _predict(self, vectors_BN: Tensor, x: Tensor, t: Tensor, prompts: Tensor, each: int) -> Tensor:
        with self._autocast(), self.bank.active(vectors_BN, each, train_A=self.train_A):
            out: Tensor = self.base.unet(x, t, **self.base.conditioning(prompts, x)).sample
        return out.float()

    def _decode(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self.base.pictures(latents)

    def _autocast(self) -> torch.autocast:
        kind, wanted = self.base.device.type, self.config.autocast
        fast = kind == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bfloat16" or (wanted == "auto" and fast))

    def _outside(self, changes: list[Tensor], boxes: NDArray[Any], seen: NDArray[np.bool_], side: int) -> Tensor:
        """Mean change of the predictions outside of an ellipse around the head; 0 where no face is."""
        cells = changes[0].shape[-1]
        at = (torch.arange(cells, device=changes[0].device) + 0.5) * side / cells
        x1, y1, x2, y2 = torch.from_numpy(boxes).to(at.device)[..., None, None].unbind(1)
        across, down = (2 * at - x1 - x2) / (x2 - x1 + 1e-6), (2 * at[:, None] - y1 - y2) / (y2 - y1 + 1e-6)
        far = (across.square() + down.square() > self.config.head**2).float()
        far = far * torch.from_numpy(seen).to(at.device)[:, None, None]
        per_step = [(change * far).sum((1, 2)) / far.sum((1, 2)).clamp(min=1) for change in changes]
        return torch.stack(per_step).mean(0)

    def _denoising(self, vectors_BN: Tensor, slots_B: Slots, shown_B: Slots, draws: Batch) -> Tensor:
        """(B,) the base model's loss on photos that are not the one shown."""
        V, picks_BV = self.config.denoising_photos, self._others(draws["photo"], slots_B, shown_B)
        x0 = self.people.photos(slots_B, picks_BV).to(self.base.device)
        prompts_BV = self.people.prompts_of(slots_B, picks_BV)
        low, high = self.config.timestep_range
        timesteps = (low + draws["timestep"] * (high - low)).long()
        noisy, target = self.schedule.add_noise(x0, draws["noise"], timesteps)
        prompts = self.prompts_TSD[prompts_BV.ravel()].to(self.base.dtype)
        out = self._predict(vectors_BN, noisy.flatten(0, 1).to(self.base.dtype), timesteps.flatten(), prompts, V)
        return (out.view_as(target) - target).square().mean((1, 2, 3, 4))

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, slots_B: Slots, white_BZ: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss: 1 - similarity of pictures to the photos that were not shown."""
        first_B = np.zeros(len(slots_B), np.int64)
        condition_BE, targets_BRE = (t.to(self.base.device) for t in self.people.faces(slots_B, first_B))
        pictures = self.judge.draw(self._vectors(self._codes(condition_BE, white_BZ)))
        if slots_B[0] == self.validation_slots[0]:
            self.sheet = pictures[:8]
        parts = self.judge.figures(pictures, targets_BRE)
        return 1 - parts["likeness"], parts

    def summarise(self, values: dict[str, Any]) -> dict[str, Any]:
        return self.judge.score(values, float(self.photo_detail))

    @torch.no_grad()
    def _some_latents(self) -> Tensor:
        return torch.from_numpy(np.array(self.people.latents_T[:64], np.float32)).to(self.base.device)


# a face in the middle, for crops of pictures without one: they count nowhere
_ANYWHERE = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]], np.float32)


def _pick(draws: Tensor, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.minimum((draws.cpu().numpy() * counts).astype(np.int64), counts - 1)


def _make_parameter(module: nn.Module, name: str) -> None:
    value = module._buffers.pop(name)
    assert value is not None
    module.register_parameter(name, nn.Parameter(value.detach().clone()))
