"""A toy corpus that a synthesiser can be judged on: people are low-rank vectors, and their embeddings tell who they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.synthesis import (
    PCA,
    CodeSpace,
    DenoiserConfig,
    Diffusion,
    DiffusionConfig,
    LatentCodes,
    LoRAVAE,
    Normaliser,
    PCACodes,
    Synthesizer,
    VAEConfig,
    VectorCodes,
    fit_pca,
)
from lora_diffusion.synthesis.synthesizer import Provenance

LAYOUT = LoRALayout.from_shapes(
    {"down.attn1.to_q": (20, 24), "up.attn1.to_v": (16, 30)}, rank=1, alpha=1.0, target_modules=("to_q", "to_v")
)
CONSTANT = 20  # the first matrix A is the same for everybody
SMALL = DenoiserConfig(width=32, depth=2, condition_width=32, rank=2, generator_width=8)


@dataclass(frozen=True)
class Toy:
    """vectors (P, N), embeddings (P, 512), and the traits (P, 4) that both were made from."""

    vectors_PN: Tensor
    embeddings_PC: Tensor
    traits_PT: Tensor

    @property
    def normaliser(self) -> Normaliser:
        return Normaliser.from_statistics(Statistics.of(self.vectors_PN.numpy()))

    def pca(self, components: int) -> PCA:
        x_PM = self.normaliser.normalise(self.vectors_PN).numpy()
        return fit_pca(lambda: [x_PM], components)


def toy(people: int = 120, noise: float = 0.1, seed: int = 0) -> Toy:
    fixed, g = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    N, traits = LAYOUT.size, 4
    to_vector, to_face = torch.randn(traits, N, generator=fixed), torch.randn(traits, 512, generator=fixed)
    offset = torch.randn(N, generator=fixed)
    traits_PT = torch.randn(people, traits, generator=g)
    vectors = offset + traits_PT @ to_vector + noise * torch.randn(people, N, generator=g)
    vectors[:, :CONSTANT] = offset[:CONSTANT]
    embeddings = torch.nn.functional.normalize(traits_PT @ to_face + 0.3 * torch.randn(people, 512, generator=g), dim=1)
    return Toy(vectors, embeddings, traits_PT)


def space_of(kind: str, data: Toy) -> CodeSpace:
    """Untrained, standardised."""
    if kind == "vector":
        space: CodeSpace = VectorCodes(data.normaliser)
    elif kind == "pca":
        space = PCACodes(data.normaliser, data.pca(6))
    else:
        torch.manual_seed(0)
        vae = LoRAVAE(VAEConfig(latent_size=6, hidden=(16, 12)), data.normaliser)
        vae.start_from_pca(data.pca(6))
        space = LatentCodes(vae)
    space.standardise([data.vectors_PN])
    return space


def untrained(kind: str = "pca", prior: str = "gaussian", config: DenoiserConfig = SMALL) -> Synthesizer:
    """A whole synthesiser whose denoiser has random weights everywhere, so that everything has an effect."""
    from lora_diffusion.synthesis.diffusion import prior_factor

    data = toy()
    space = space_of(kind, data)
    factor = prior_factor(space.encode(data.vectors_PN)) if prior == "corpus" else None
    torch.manual_seed(1)
    diffusion = Diffusion(DiffusionConfig(prior=prior), factor)  # type: ignore[arg-type]
    denoiser = diffusion.denoiser(space.size, 512, config)
    if denoiser.guess is not None:
        pairs = [(data.embeddings_PC, space.encode(data.vectors_PN))]
        denoiser.guess.fit(lambda: pairs, lambda: pairs)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Synthesizer(LAYOUT, space, denoiser, diffusion, Provenance(recogniser={"name": "tiny"}))
