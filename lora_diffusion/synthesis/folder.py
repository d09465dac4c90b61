"""A synthesiser's folder, local or in a bucket: what lies in it, and how it is read and written.

    config.json            format version, layout, code space, denoiser, diffusion, provenance; written last
    codes.safetensors      normaliser, and PCA or VAE
    denoiser.safetensors   denoiser, and the prior's factor if it has one
    edits.safetensors      attribute directions, if any
    neighbours.safetensors embeddings and codes of corpus people, if any: the nearest-neighbour control

No pickle. docs/reference/formats.md describes the fields. Axes: P people, C condition, Z code size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lora_diffusion.artifacts import checksum
from lora_diffusion.artifacts.identity import no_synthesizer
from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.codes import CodeSpace, build_codes
from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.training.checkpoint import strip_prefix, with_prefix

FORMAT = "lora-diffusion-synthesizer"
FORMAT_VERSION = 2  # version 1 knows no learned components; what has none is written as version 1
COMPONENTS, COMPONENTS_SCALE = "components_KM", "components_scale_K"
FILES = ("codes", "denoiser", "edits", "neighbours")


@dataclass(frozen=True)
class Provenance:
    """What a synthesiser was made from. `base`, `recogniser`: name and fingerprint; `corpus`: also recipe_id and start;
    `figures`: as measured."""

    base: dict[str, str] = field(default_factory=dict)
    recogniser: dict[str, str] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)  # the corpus' recipe, for `refine`
    figures: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    seed: int = 0


@dataclass(frozen=True)
class LatentSampling:
    """How to draw from a synthesiser; its folder holds what was found to be best. See `sample_codes`.

    deviation_scale: factor of the LoRA's deviation from the corpus' mean: regression averages a person's features away,
        more than 1 brings them back.
    """

    guidance_scale: float = 1.0  # of the denoiser; 1 is the conditional answer
    num_inference_steps: int = 25  # of the denoiser
    temperature: float = 1.0  # factor of the starting noise
    deviation_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or min(self.guidance_scale, self.temperature, self.deviation_scale) < 0:
            raise ValueError(f"num_inference_steps must be at least 1, and nothing negative: {self}")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Corpus people: unit embeddings (P, C) and codes (P, Z). Embeddings are biometric data: leave them out of what
    you publish, unless the people are invented. `hashes_PH`: uint8, of each name with the corpus' key, so that one person
    can be removed; None: made by an earlier release, or of a corpus without a key."""

    embeddings_PC: Tensor
    codes_PZ: Tensor
    hashes_PH: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class Parts(NamedTuple):
    """What a synthesiser consists of."""

    layout: LoRALayout
    codes: CodeSpace
    denoiser: Denoiser
    diffusion: Diffusion
    provenance: Provenance
    directions: AttributeDirections | None
    neighbours: Neighbours | None
    latent_sampling: LatentSampling


def write_folder(path: str | Path, parts: Parts, dtype: torch.dtype = torch.float32) -> None:
    """`dtype` float16 halves the folder: matrices only; biases, the normaliser and its constants stay in float32.

    int8: as float16, and learned components in 8 bits, with a scale for each, and the normaliser in float16.
    """
    files = {
        "codes": dict(parts.codes.state_dict()),
        "denoiser": with_prefix("denoiser", dict(parts.denoiser.state_dict()))
        | with_prefix("diffusion", dict(parts.diffusion.state_dict())),
    }
    if parts.directions is not None:
        files["edits"] = parts.directions.tensors()
    if parts.neighbours is not None:
        files["neighbours"] = parts.neighbours.tensors()
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if parts.codes.kind == "learned" else 1,
        "layout_id": parts.layout.layout_id,
        "layout": parts.layout.to_dict(),
        "code_size": parts.codes.size,
        "condition_size": parts.denoiser.condition_size,
        "codes": parts.codes.describe(),
        "denoiser": to_dict(parts.denoiser.config),
        "diffusion": to_dict(parts.diffusion.config),
        "attributes": [] if parts.directions is None else list(parts.directions.names),
        "latent_sampling": to_dict(parts.latent_sampling),
        "provenance": to_dict(parts.provenance),
        "files": sorted(files),
    }
    if dtype == torch.int8:
        dtype = torch.float16
        if COMPONENTS in files["codes"]:
            U_KM = files["codes"][COMPONENTS].detach().cpu()
            scale_K = U_KM.abs().amax(1).clamp(min=1e-12) / 127
            for name in ("normaliser.mean_N", "normaliser.std_N"):
                files["codes"][name] = files["codes"][name].half()
            files["codes"] |= {COMPONENTS: (U_KM / scale_K[:, None]).round().to(torch.int8), COMPONENTS_SCALE: scale_K}
    store, belong = open_store(path), {}
    for name, tensors in files.items():
        compact = {key: _compact(tensor, dtype) for key, tensor in tensors.items()}
        data = checksum.seal(safetensors.torch.save(compact))
        store.write(f"{name}.safetensors", data)
        if name in ("codes", "denoiser"):  # the others may change, or go, by themselves
            belong[name] = hashlib.sha256(data).hexdigest()
    store.write_json("config.json", checksum.seal_json({**config, "belong": belong}))
    for name in set(FILES) - files.keys():  # of what was written here before: a table of people must not go out with it
        store.delete(f"{name}.safetensors")


def read_folder(path: str | Path) -> Parts:
    """Parts on the CPU, in float32.

    Raises:
        ValueError: nothing there, another format or version, missing or cut files, tensors that do not fit.
    """
    store = open_store(path)
    try:
        config = store.read_json("config.json")
    except FileNotFoundError as error:
        raise no_synthesizer(store.uri) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{store.uri}/config.json is none of a synthesiser: expected format {FORMAT!r}")
    if config.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"the synthesiser at {store.uri} has format version {config.get('format_version')}, this release reads "
            f"1 to {FORMAT_VERSION}: install the release of lora_diffusion that wrote it"
        )
    try:
        files = {name: _read(store, name, config.get("belong", {}).get(name)) for name in config["files"]}
        return _parts(config, files)
    except FileNotFoundError as error:
        raise ValueError(f"the synthesiser at {store.uri} is not whole: {error}. Copy it again") from error
    except OSError:
        raise
    except Exception as error:  # a config that somebody else wrote meets the parts with many kinds of error
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"the synthesiser at {store.uri} cannot be read: {reason[:500]}. Copy it again") from error


def _read(store: Store, name: str, sha256: str | None) -> dict[str, Tensor]:
    if name not in FILES:
        raise ValueError(f"its config.json names a file {name!r}; there are {', '.join(FILES)}")
    data = store.read(f"{name}.safetensors")
    try:
        checksum.check(data)
        tensors = _float32(safetensors.torch.load(data))
    except Exception as error:  # unknown dtypes, cut data: each has its own class
        raise ValueError(f"{name}.safetensors is damaged ({error or type(error).__name__})") from error
    if sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError(f"{name}.safetensors is another synthesiser's: it was being written, or its writer was killed")
    return tensors


def _parts(config: Mapping[str, Any], files: Mapping[str, dict[str, Tensor]]) -> Parts:
    tensors, network = files["codes"], strip_prefix("denoiser", files["denoiser"])
    if (scale_K := tensors.pop(COMPONENTS_SCALE, None)) is not None:
        if scale_K.shape != tensors[COMPONENTS].shape[:1]:
            raise ValueError(f"{COMPONENTS} and {COMPONENTS_SCALE} are not of one length")
        tensors[COMPONENTS] = tensors[COMPONENTS].float() * scale_K[:, None]
    codes = build_codes(config["codes"], tensors)
    prior = strip_prefix("diffusion", files["denoiser"])
    diffusion = Diffusion(from_dict(DiffusionConfig, config["diffusion"]), prior.get("factor_ZZ"))
    sizes, how = (config["code_size"], config["condition_size"]), from_dict(DenoiserConfig, config["denoiser"])
    _check_sizes(*sizes, how, network)
    denoiser = diffusion.denoiser(*sizes, how)
    denoiser.load_state_dict(network)
    parts = Parts(
        LoRALayout.from_dict(config["layout"]),
        codes,
        denoiser,
        diffusion,
        from_dict(Provenance, config["provenance"]),
        AttributeDirections(tuple(config["attributes"]), **files["edits"]) if "edits" in files else None,
        Neighbours(**people) if len((people := files.get("neighbours", {})).get("codes_PZ", ())) else None,
        from_dict(LatentSampling, config.get("latent_sampling", {})),
    )
    _check_beside(parts, *sizes)
    return parts


def _check_sizes(code_size: int, condition_size: int, how: DenoiserConfig, tensors: Mapping[str, Tensor]) -> None:
    """Before room is made for a network: whether the sizes that the configuration says are those of the tensors."""
    most = sum(tensor.numel() for tensor in tensors.values())
    sizes = {"code_size": code_size, "condition_size": condition_size, **to_dict(how)}
    for name, size in sizes.items():
        if type(size) is int and not 0 < size <= most:
            raise ValueError(f"{name} is {size}, and denoiser.safetensors holds {most:,} numbers in all")
    if how.depth > len(tensors):
        raise ValueError(f"depth is {how.depth}, and denoiser.safetensors holds {len(tensors)} tensors")
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in Denoiser(code_size, condition_size, how).state_dict().items()
        }
    if how.linear_guess:
        expected["guess.weight_CZ"] = torch.Size((condition_size, code_size))
    for name, shape in expected.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"config.json asks for a {name} of {tuple(shape)}, denoiser.safetensors has {found}")


def _check_beside(parts: Parts, code_size: int, condition_size: int) -> None:
    """Whether the attribute directions and neighbours are of this code space."""
    edits, people, shapes = parts.directions, parts.neighbours, []
    if edits is not None:
        A = len(edits.names)
        shapes += [(edits.directions_AZ, (A, code_size)), (edits.std_A, (A,)), (edits.separation_A, (A,))]
    if people is not None:
        P = people.codes_PZ.shape[0]
        shapes += [(people.embeddings_PC, (P, condition_size)), (people.codes_PZ, (P, code_size))]
    if wrong := [f"{tuple(tensor.shape)}, expected {shape}" for tensor, shape in shapes if tensor.shape != shape]:
        raise ValueError(f"attribute directions or neighbours of another synthesiser: {wrong[0]}")


def _compact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.ndim >= 2 and tensor.is_floating_point() else tensor.clone()


def _float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
