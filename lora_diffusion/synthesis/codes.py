"""Code spaces: what the denoiser works in. Latents of the VAE, PCA coefficients, the normalised parameters themselves, or
coefficients of components that were trained through pictures.

One denoiser runs in all of them, so that they can be compared. The diffusion needs data of about unit variance:
`standardise` measures the corpus' codes once, and from then on codes go out and come in with mean 0 and unit variance.

Axes: B batch, N vector length, M varying parameters, K components, Z code size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA
from lora_diffusion.synthesis.vae import LoRAVAE, VAEConfig

Kind = Literal["latent", "pca", "vector"]  # what a corpus is turned into; pictures make `learned` of the second
KINDS: tuple[Kind, ...] = ("latent", "pca", "vector")
FEW = 16  # vectors: below it one product is faster than many small ones


class CodeSpace(nn.Module):
    """`encode`: vectors (B, N) -> codes (B, Z); `decode`: back, as well as the space can. `size`: Z.

    `raw_encode`: vectors (B, N) -> raw codes (B, Z); `raw_decode`: raw codes -> normalised parameters (B, M).
    Codes are `(raw - shift) / scale`; shift 0 and scale 1 until `standardise` was called.
    """

    kind: str
    normaliser: Normaliser
    shift_Z: Tensor
    scale_Z: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("shift_Z", torch.zeros(size))
        self.register_buffer("scale_Z", torch.ones(size))

    def encode(self, vectors_BN: Tensor) -> Tensor:
        return (self.raw_encode(vectors_BN) - self.shift_Z) / self.scale_Z

    def decode(self, codes_BZ: Tensor, deviation_scale: float = 1.0) -> Tensor:
        """Vectors (B, N); their deviation from the corpus' mean is multiplied by `deviation_scale`."""
        if codes_BZ.ndim != 2 or codes_BZ.shape[1] != self.size:
            raise ValueError(
                f"codes have shape {tuple(codes_BZ.shape)}; this {self.kind} space expects (B, {self.size})"
            )
        return self.normaliser.restore(self.raw_decode(codes_BZ * self.scale_Z + self.shift_Z), deviation_scale)

    @torch.no_grad()
    def decode_array(self, codes_BZ: Tensor, deviation_scale: float = 1.0) -> NDArray[np.float32]:
        """As `decode`, up to float error, into a new array.

        Many vectors are written once, a block of columns at a time, that the processor's cache holds, into memory of NumPy,
        which asks the system for large pages.
        """
        normaliser, blocks = self.normaliser, self.normaliser.blocks
        if len(codes_BZ) < FEW or blocks is None or codes_BZ.device.type != "cpu":
            return self.decode(codes_BZ, deviation_scale).float().cpu().numpy()
        columns = self.raw_columns(codes_BZ * self.scale_Z + self.shift_Z)
        array_BN = np.empty((len(codes_BZ), normaliser.vector_size), np.float32)
        vectors_BN = torch.from_numpy(array_BN).copy_(normaliser.mean_N.expand(len(codes_BZ), -1))
        for whole, varying in blocks:
            normaliser.restore_block(columns(varying), varying, deviation_scale, out=vectors_BN[:, whole])
        return array_BN

    def raw_encode(self, vectors_BN: Tensor) -> Tensor:
        raise NotImplementedError

    def raw_decode(self, raw_BZ: Tensor) -> Tensor:
        raise NotImplementedError

    def raw_columns(self, raw_BZ: Tensor) -> Callable[[slice], Tensor]:
        """`raw_decode` by columns of its answer."""
        whole_BM = self.raw_decode(raw_BZ)
        return lambda columns: whole_BM[:, columns]

    def describe(self) -> dict[str, Any]:
        """What `build_codes` needs beside the tensors."""
        return {"kind": self.kind}

    @torch.no_grad()
    def standardise(
        self, chunks: Iterable[Tensor], scale: Literal["each", "together"] = "each", floor: float = 0.05
    ) -> None:
        """Measure the codes of the corpus, vectors (B, N) in chunks, and give them mean 0 and unit variance.

        scale: "each" number by its own deviation, or all "together" by their root mean square, which keeps what is
            large in the space large in the loss of the denoiser.
        floor: with "each", a number that hardly varies (a latent that the VAE does not use) is divided by no less than
            this share of the root mean square, so that its noise is not blown up.
        """
        parts = (Statistics.of(self.raw_encode(vectors_BN).cpu().numpy()) for vectors_BN in chunks)
        found = Statistics.merged(parts, self.size)
        if found.count < 2:
            raise ValueError(f"codes of {found.count} LoRAs were given; at least two are needed to know how they vary")
        mean_Z, std_Z = torch.from_numpy(found.mean), torch.from_numpy(found.std)
        rms = float(std_Z.square().mean().sqrt())
        if rms == 0:
            raise ValueError(f"all LoRAs have the same code: this {self.kind} space tells nobody apart")
        self.shift_Z.copy_(mean_Z)
        self.scale_Z.copy_(std_Z.clamp(min=floor * rms) if scale == "each" else torch.full_like(std_Z, rms))


class VectorCodes(CodeSpace):
    """The normalised parameters: Z = M."""

    kind = "vector"

    def __init__(self, normaliser: Normaliser) -> None:
        super().__init__(normaliser.size)
        self.normaliser = normaliser

    def raw_encode(self, vectors_BN: Tensor) -> Tensor:
        return self.normaliser.normalise(vectors_BN)

    def raw_decode(self, raw_BZ: Tensor) -> Tensor:
        return raw_BZ


class PCACodes(CodeSpace):
    """Coefficients of the principal components of the normalised parameters: Z = K."""

    kind = "pca"

    def __init__(self, normaliser: Normaliser, pca: PCA) -> None:
        super().__init__(len(pca))
        self.normaliser, self.pca = normaliser, pca

    def raw_encode(self, vectors_BN: Tensor) -> Tensor:
        return self.pca.encode(self.normaliser.normalise(vectors_BN))

    def raw_decode(self, raw_BZ: Tensor) -> Tensor:
        return self.pca.decode(raw_BZ)

    def raw_columns(self, raw_BZ: Tensor) -> Callable[[slice], Tensor]:
        mean_M, components_KM = self.pca.mean_M, self.pca.components_KM
        return lambda columns: torch.addmm(mean_M[columns], raw_BZ, components_KM[:, columns])


class LearnedCodes(CodeSpace):
    """Coefficients of components that need not be orthonormal, as training through pictures leaves them: Z = K.

    The entries of `components_KM` are about 1; `scale_Z` holds their size. `encode` is the least-squares solution.
    Where `mixing_KR` is given, the components are its product with fewer rows (R, M): see `truncated`.
    """

    kind = "learned"
    components_KM: Tensor
    mixing_KR: Tensor | None

    def __init__(self, normaliser: Normaliser, components_KM: Tensor, mixing_KR: Tensor | None = None) -> None:
        super().__init__(len(components_KM if mixing_KR is None else mixing_KR))
        self.normaliser = normaliser
        self.register_buffer("components_KM", components_KM.float())
        self.register_buffer("mixing_KR", None if mixing_KR is None else mixing_KR.float())

    @classmethod
    def of(cls, space: PCACodes | LearnedCodes, new: int, new_scale: float = 1.0, seed: int = 0) -> LearnedCodes:
        """The same space with `new` random components at its end, each `new_scale` times as large as the others."""
        old_KM = space.whole() if isinstance(space, LearnedCodes) else space.pca.components_KM
        M, generator = old_KM.shape[1], torch.Generator().manual_seed(seed)
        size = old_KM.square().mean(1).sqrt().mean()
        normaliser = Normaliser(space.normaliser.mean_N, space.normaliser.std_N)
        if isinstance(space, PCACodes):
            normaliser = Normaliser(normaliser.restore(space.pca.mean_M[None])[0], normaliser.std_N)
        made = cls(normaliser, torch.cat([old_KM / size, torch.randn(new, M, generator=generator)]))
        made.scale_Z[: space.size], made.shift_Z[: space.size] = space.scale_Z * size, space.shift_Z * size
        made.scale_Z[space.size :] = new_scale * made.scale_Z[: space.size].square().mean().sqrt()
        return made

    def truncated(self, rank: int, codes_PZ: Tensor) -> LearnedCodes:
        """The same codes, their LoRAs projected to the `rank` directions in which those of `codes_PZ` vary most."""
        U_KM = self.whole().double()
        if not 1 <= rank <= min(self.size, len(codes_PZ)):
            raise ValueError(f"{rank} components asked for; there are {self.size}, and {len(codes_PZ)} codes to tell")
        raw_PZ = (codes_PZ * self.scale_Z + self.shift_Z).double()
        gram_KK = U_KM @ U_KM.T
        values, vectors = torch.linalg.eigh(raw_PZ.T @ raw_PZ / len(raw_PZ))
        root_KK = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        values, vectors = torch.linalg.eigh(root_KK @ gram_KK @ root_KK)
        into_KR = root_KK @ vectors[:, -rank:] / values[-rank:].clamp(min=1e-12).sqrt()
        unit = U_KM.shape[1] ** 0.5  # entries of about 1
        made = LearnedCodes(self.normaliser, into_KR.T @ U_KM * unit, gram_KK @ into_KR / unit)
        made.scale_Z, made.shift_Z = self.scale_Z.clone(), self.shift_Z.clone()
        return made

    def whole(self) -> Tensor:
        """All components (K, M)."""
        return self.components_KM if self.mixing_KR is None else self.mixing_KR @ self.components_KM

    def raw_encode(self, vectors_BN: Tensor) -> Tensor:
        U_RM = self.components_KM.double()
        mixed_BR = torch.linalg.solve(U_RM @ U_RM.T, U_RM @ self.normaliser.normalise(vectors_BN).double().T).T
        raw_BZ = mixed_BR if self.mixing_KR is None else mixed_BR @ torch.linalg.pinv(self.mixing_KR.double())
        return raw_BZ.float()

    def raw_decode(self, raw_BZ: Tensor) -> Tensor:
        return self.raw_columns(raw_BZ)(slice(None))

    def raw_columns(self, raw_BZ: Tensor) -> Callable[[slice], Tensor]:
        mixed_BR = raw_BZ if self.mixing_KR is None else raw_BZ @ self.mixing_KR
        return lambda columns: mixed_BR @ self.components_KM[:, columns]


class LatentCodes(CodeSpace):
    """Means of the VAE's posterior: Z = latent_size. The VAE is frozen and in eval mode from here on."""

    kind = "latent"

    def __init__(self, vae: LoRAVAE) -> None:
        super().__init__(vae.config.latent_size)
        self.vae = vae.eval().requires_grad_(False)
        self.normaliser = vae.normaliser

    def train(self, mode: bool = True) -> LatentCodes:
        super().train(mode)
        self.vae.eval()  # dropout must not reach the codes
        return self

    def raw_encode(self, vectors_BN: Tensor) -> Tensor:
        return self.vae.encode(vectors_BN)[0]

    def raw_decode(self, raw_BZ: Tensor) -> Tensor:
        return self.vae.decode_normalised(raw_BZ)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "vae": to_dict(self.vae.config)}


def build_codes(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CodeSpace:
    """A code space from `describe()` and its `state_dict()`. Raises ValueError if they do not fit."""
    kind = description.get("kind")
    try:
        normaliser = Normaliser(tensors["normaliser.mean_N"].float(), tensors["normaliser.std_N"].float())
        if kind == "vector":
            space: CodeSpace = VectorCodes(normaliser)
        elif kind == "pca":
            names = ("mean_M", "components_KM", "explained_variance_K", "total_variance")
            space = PCACodes(normaliser, PCA(*(tensors[f"pca.{name}"] for name in names)))
        elif kind == "learned":
            space = LearnedCodes(normaliser, tensors["components_KM"], tensors.get("mixing_KR"))
        elif kind == "latent":
            config = from_dict(VAEConfig, description["vae"])
            _check_sizes(config, normaliser, tensors)
            space = LatentCodes(LoRAVAE(config, normaliser))
        else:
            raise ValueError(f"unknown code space {kind!r}; this release knows {', '.join(KINDS)}, learned")
        space.load_state_dict(dict(tensors))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the tensors do not make a {kind} code space: {error}") from error
    return space


def _check_sizes(config: VAEConfig, normaliser: Normaliser, tensors: Mapping[str, Tensor]) -> None:
    """Before room is made for a VAE: whether its sizes are those of the tensors."""
    most = sum(tensor.numel() for tensor in tensors.values())
    if max(config.latent_size, *config.hidden, len(config.hidden)) > most:
        raise ValueError(f"the tensors do not make a latent code space of {config}: they hold {most:,} numbers in all")
    with torch.device("meta"):
        expected = LoRAVAE(config, normaliser).state_dict()
    for name, tensor in expected.items():
        if getattr(tensors.get(f"vae.{name}"), "shape", None) != tensor.shape:
            raise ValueError(f"the tensors do not make a latent code space: no {name} of {tuple(tensor.shape)}")


@dataclass(frozen=True)
class Reconstruction:
    """How well a code space keeps vectors. Similarity of renders is what counts in the end; see `evaluate`.

    r2: share of the normalised variance that comes back, about the corpus' mean.
    relative_error: |v - v̂| / |v - mean|, of the vectors themselves, over all rows.
    """

    rows: int
    r2: float
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def reconstruction(space: CodeSpace, chunks: Iterable[Tensor]) -> Reconstruction:
    """Over vectors (B, N) in chunks: held-out rows tell more than the rows that the space was fitted on."""
    rows, left, total, raw_left, raw_total = 0, 0.0, 0.0, 0.0, 0.0
    for vectors_BN in chunks:
        vectors_BN = vectors_BN.float()
        again_BN = space.decode(space.encode(vectors_BN))
        x_BM, y_BM = space.normaliser.normalise(vectors_BN), space.normaliser.normalise(again_BN)
        rows += len(vectors_BN)
        left += float((x_BM - y_BM).double().square().sum())
        total += float(x_BM.double().square().sum())
        raw_left += float((vectors_BN - again_BN).double().square().sum())
        raw_total += float((vectors_BN - space.normaliser.mean_N).double().square().sum())
    if rows == 0 or total == 0:
        raise ValueError("no LoRAs were given to reconstruct, or only the corpus' mean")
    return Reconstruction(rows, 1 - left / total, (raw_left / raw_total) ** 0.5)
