"""The denoiser: a residual MLP over codes, told the time and the face, by AdaNorm or by ADALoRA.

ADALoRA here is the paper's name (arXiv:2412.02352) for a way to condition; it has nothing to do with peft's AdaLoRA, which
budgets ranks. The paper published no equations: these are our reading of it. With c the condition (timestep and identity
embedding, each through a small MLP, summed) and F(h) = W₂ silu(W₁ h + b₁) + b₂ the linear layers of a block:

AdaNorm (adaLN-Zero; Peebles & Xie 2023, arXiv:2212.09748, section 3.2), the activation is scaled and shifted:

    h <- h + g(c) * F( (1 + s(c)) * norm(h) + t(c) )          s, t, g linear in c and 0 at the start

ADALoRA, the weights are changed: every linear layer W, those of the blocks and the first and last one of the network, is

    y = W x + b + B(c) A(c) x        A(c) (R, in) = A₀ + Σ_g u_g(c) A_g,   B(c) (out, R) = B₀ + Σ_g u_g(c) B_g

where u(c), `generator_width` numbers for each block, is linear in c; A₀ random, B₀ and all B_g 0 at the start, as in a LoRA,
so that both networks begin unconditioned. The change is quadratic in u: a product of two things that the face decides.
`with_equal_parameters` makes the two comparable.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) needs a "no face": a learned embedding in its place.

Axes: B batch, Z code size, C condition (512), D width, U generator_width, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.synthesis.linear_guess import SMALLEST_VARIANCE, LinearGuess


@dataclass(frozen=True)
class DenoiserConfig:
    """width D, depth (blocks), expansion (inner width of a block / D), condition_width (of c).

    rank, generator_width: of ADALoRA only.
    input_skip: adds a(t) times the noisy code to the answer, a(t) learned and 0 at the start: a network narrower than
        the code cannot pass noise on by itself.
    dropout: within the blocks, against learning a small corpus by heart.
    linear_guess: the network adds to a linear regression from the face instead of starting from nothing (`linear_guess.py`).
    """

    width: int = 512  # D, of the hidden layers
    depth: int = 4  # residual blocks
    expansion: int = 2  # hidden width of a block, times D
    condition_width: int = 256  # of the condition's embedding
    conditioning: Literal["adalora", "adanorm"] = "adalora"  # how the face enters: see the method
    rank: int = 4
    generator_width: int = 32
    dropout: float = 0.0
    input_skip: bool = True
    linear_guess: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "expansion", "condition_width", "rank", "generator_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in 0 .. 1")


class ADALoRALinear(nn.Module):
    """`y = W x + b + B(u) A(u) x`, with u (B, U) made from the condition."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.rank = rank
        self.make_A = nn.Linear(generator_width, rank * inputs)
        self.make_B = nn.Linear(generator_width, rank * outputs)
        bound = 1 / math.sqrt(inputs)
        nn.init.uniform_(self.make_A.bias, -bound, bound)
        nn.init.uniform_(self.make_A.weight, -bound / math.sqrt(generator_width), bound / math.sqrt(generator_width))
        nn.init.zeros_(self.make_B.weight)
        nn.init.zeros_(self.make_B.bias)

    def forward(self, x_BI: Tensor, u_BU: Tensor) -> Tensor:
        A_BRI = self.make_A(u_BU).view(len(x_BI), self.rank, -1)
        B_BRO = self.make_B(u_BU).view(len(x_BI), self.rank, -1)
        low_BR = torch.bmm(A_BRI, x_BI[:, :, None])[:, :, 0]
        return self.linear(x_BI) + torch.bmm(low_BR[:, None], B_BRO)[:, 0]


class AdaNormBlock(nn.Module):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        D, inner = config.width, config.width * config.expansion
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(config.condition_width, 3 * D))
        self.linear_in, self.linear_out = nn.Linear(D, inner), nn.Linear(inner, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BD: Tensor, c_BW: Tensor) -> Tensor:
        scale_BD, shift_BD, gate_BD = self.modulation(c_BW).chunk(3, dim=1)
        x_BD = (1 + scale_BD) * self.norm(h_BD) + shift_BD
        return h_BD + gate_BD * self.linear_out(self.dropout(F.silu(self.linear_in(x_BD))))


class ADALoRABlock(nn.Module):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        D, inner, R, U = config.width, config.width * config.expansion, config.rank, config.generator_width
        self.norm = nn.LayerNorm(D)
        self.generator = nn.Linear(config.condition_width, U)
        self.linear_in, self.linear_out = ADALoRALinear(D, inner, R, U), ADALoRALinear(inner, D, R, U)
        _zero(self.linear_out.linear)  # as AdaNorm's gate: every block begins as the identity
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BD: Tensor, c_BW: Tensor) -> Tensor:
        u_BU = self.generator(c_BW)
        inner_BI = F.silu(self.linear_in(self.norm(h_BD), u_BU))
        return h_BD + self.linear_out(self.dropout(inner_BI), u_BU)


class Denoiser(nn.Module):
    """Predicts noise, code or velocity (as trained) from a noisy code, the timestep and the identity embedding."""

    def __init__(
        self, code_size: int, condition_size: int, config: DenoiserConfig, guess: LinearGuess | None = None
    ) -> None:
        """`guess`: what the network adds to; `Diffusion.denoiser` makes it where the configuration asks for one."""
        super().__init__()
        self.guess = guess
        self.code_size, self.condition_size, self.config = code_size, condition_size, config
        D, W = config.width, config.condition_width
        self.embed_time = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W))
        self.embed_face = nn.Sequential(nn.Linear(condition_size, W), nn.SiLU(), nn.Linear(W, W))
        self.no_face_W = nn.Parameter(torch.zeros(W))
        self.input_skip = _zero(nn.Linear(W, 1)) if config.input_skip else None
        if config.conditioning == "adalora":
            R, U = config.rank, config.generator_width
            self.ends_generator: nn.Linear | None = nn.Linear(W, 2 * U)
            self.first: nn.Module = ADALoRALinear(code_size, D, R, U)
            self.last: nn.Module = ADALoRALinear(D, code_size, R, U)
            self.blocks = nn.ModuleList(ADALoRABlock(config) for _ in range(config.depth))
            self.norm, self.modulation = nn.LayerNorm(D), None
            _zero(self.last.linear)
        else:
            self.ends_generator = None
            self.first, self.last = nn.Linear(code_size, D), _zero(nn.Linear(D, code_size))
            self.blocks = nn.ModuleList(AdaNormBlock(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(D, elementwise_affine=False)
            self.modulation = _zero(nn.Linear(W, 2 * D))

    def forward(
        self, noisy_BZ: Tensor, timesteps_B: Tensor, condition_BC: Tensor | None, drop_B: Tensor | None = None
    ) -> Tensor:
        """(B, Z). `condition_BC`: unit vectors, or None for no face at all; `drop_B`: True where the face is hidden.

        Raises:
            ValueError: codes or conditions of another size.
        """
        if noisy_BZ.ndim != 2 or noisy_BZ.shape[1] != self.code_size:
            raise ValueError(f"codes have shape {tuple(noisy_BZ.shape)}; this denoiser expects (B, {self.code_size})")
        c_BW = F.silu(self._embed_time(timesteps_B) + self._embed_condition(len(noisy_BZ), condition_BC, drop_B))
        if self.ends_generator is not None:
            first_BU, last_BU = self.ends_generator(c_BW).chunk(2, dim=1)
            h_BD = self.first(noisy_BZ, first_BU)
        else:
            h_BD = self.first(noisy_BZ)
        for block in self.blocks:
            h_BD = block(h_BD, c_BW)
        if self.modulation is None:
            answer_BZ = self.last(F.silu(self.norm(h_BD)), last_BU)
        else:
            scale_BD, shift_BD = self.modulation(c_BW).chunk(2, dim=1)
            answer_BZ = self.last(F.silu((1 + scale_BD) * self.norm(h_BD) + shift_BD))
        if self.input_skip is not None:
            answer_BZ = answer_BZ + self.input_skip(c_BW) * noisy_BZ
        if self.guess is not None:
            answer_BZ = answer_BZ + self.guess(noisy_BZ, timesteps_B, condition_BC, drop_B)
        return answer_BZ

    def _embed_time(self, timesteps_B: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_timestep_embedding  # here: diffusers takes seconds to import

        W = self.config.condition_width
        waves_BW = get_timestep_embedding(timesteps_B, W, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.embed_time(waves_BW.to(self.no_face_W.dtype))

    def _embed_condition(self, batch: int, condition_BC: Tensor | None, drop_B: Tensor | None) -> Tensor:
        nobody_BW = self.no_face_W.expand(batch, -1)
        if condition_BC is None:
            return nobody_BW
        if condition_BC.shape != (batch, self.condition_size):
            raise ValueError(
                f"the condition has shape {tuple(condition_BC.shape)}; expected ({batch}, {self.condition_size}), "
                "one embedding for each code"
            )
        # a unit vector's entries are about 1 / sqrt(C): bring them to unit variance
        face_BW = self.embed_face(condition_BC * math.sqrt(self.condition_size))
        return face_BW if drop_B is None else torch.where(drop_B[:, None], nobody_BW, face_BW)


def count_parameters(config: DenoiserConfig, code_size: int, condition_size: int = 512) -> int:
    """Of a denoiser, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Denoiser(code_size, condition_size, config).parameters())


@torch.no_grad()
def widened(denoiser: Denoiser, wide: Denoiser) -> Denoiser:
    """`wide`, new and of more code numbers, made to answer as `denoiser` does; the new code numbers come out as 0.

    A network that adds nothing to its linear guess yet may be of other widths: only the guess is then taken over.

    Raises ValueError for a network of other widths that has learned something.
    """
    more = wide.code_size - denoiser.code_size
    if wide.guess is not None and denoiser.guess is not None:
        for name, values in denoiser.guess.state_dict().items():
            target = wide.guess.get_buffer(name)
            target[..., : values.shape[-1]] = values
            target[..., values.shape[-1] :] = 0.0 if name == "weight_CZ" else SMALLEST_VARIANCE
    if wide.config != denoiser.config:
        ends = [part for part in (denoiser.last, denoiser.input_skip) if part is not None]
        speaking = [p for part in ends for name, p in part.named_parameters() if "make_A" not in name]
        silent = not any(bool(parameter.any()) for parameter in speaking)
        if denoiser.guess is None or wide.guess is None or not silent:
            raise ValueError(
                f"the denoiser to start from has {denoiser.config}, the configuration asks for {wide.config}: "
                "set `denoiser` as it was"
            )
        return wide
    tensors = wide.state_dict()
    R = wide.config.rank
    for name, values in denoiser.state_dict().items():
        if name.startswith("guess."):
            continue
        target = tensors[name]
        end, kind = name.partition(".")[0], name.rpartition(".")[0]
        if target.shape == values.shape:
            target.copy_(values)
            continue
        target.zero_()
        if end == "first" and kind != "first.make_A":
            target[:, : values.shape[1]] = values
        elif kind in ("first.make_A", "last.make_B"):  # rank × code numbers, flat
            target.unflatten(0, (R, -1))[:, :-more] = values.unflatten(0, (R, -1))
        else:
            target[: len(values)] = values
    return wide


def with_equal_parameters(
    adanorm: DenoiserConfig, code_size: int, condition_size: int = 512, tolerance: float = 0.01
) -> DenoiserConfig:
    """The ADALoRA configuration with as many parameters as `adanorm` has; everything that both have stays equal.

    Only `rank` and `generator_width` are chosen: the highest rank up to 8 for which some generator width of at least
    twice the rank brings the counts within `tolerance`.

    Raises:
        ValueError: `adanorm` is none, or no rank fits (a very narrow network).
    """
    if adanorm.conditioning != "adanorm":
        raise ValueError(f"expected a configuration with conditioning adanorm, got {adanorm.conditioning}")
    wanted = count_parameters(adanorm, code_size, condition_size)
    for rank in range(8, 0, -1):
        candidate = replace(adanorm, conditioning="adalora", rank=rank)
        # the count is linear in the generator's width
        one, two = (count_parameters(replace(candidate, generator_width=u), code_size, condition_size) for u in (1, 2))
        width = round(1 + (wanted - one) / (two - one))
        if width < 2 * rank:
            continue
        candidate = replace(candidate, generator_width=width)
        if abs(count_parameters(candidate, code_size, condition_size) / wanted - 1) <= tolerance:
            return candidate
    raise ValueError(
        f"no ADALoRA of rank 1 to 8 has {wanted:,} parameters within {tolerance:.0%}: widen the network or condition_width"
    )


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
