"""Which parts of the synthesiser matter: the same training with one setting changed, several seeds each.

A run is `synthesis.recipe.SynthesizerTraining` in a folder of its own. What runs share (statistics, PCA, VAE of the same
rows) is trained once and copied; what a run leaves is its synthesiser and its metrics.

The denoiser's configuration gives the AdaNorm network; ADALoRA gets the rank and generator width that bring it to the same
number of parameters (`with_equal_parameters`), in every run.

Axes: P rows, N vector length.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from lora_diffusion.config import to_dict
from lora_diffusion.corpus import Statistics
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.lora.canonical import canonicalize
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.places import Place
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis import Synthesizer
from lora_diffusion.synthesis.codes import KINDS, Kind
from lora_diffusion.synthesis.denoiser import DenoiserConfig, with_equal_parameters
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA
from lora_diffusion.synthesis.training.dataset import CorpusRows, CorpusSnapshot, open_rows, take_snapshot
from lora_diffusion.synthesis.training.metrics import read_metrics
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining, TrainConfig
from lora_diffusion.training.checkpoint import unpack

FACTORS = ("conditioning", "code_space", "people", "prediction_type", "prior", "linear_guess", "canonical", "corpus")
MAIN = "main"  # the corpus of the evaluation


@dataclass(frozen=True)
class Variant:
    """What one run changes."""

    conditioning: Literal["adalora", "adanorm"] = "adalora"  # how the face enters the denoiser
    code_space: Kind = "latent"  # the space that the denoiser works in
    people: int | None = None  # rows of the corpus; null: all
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"  # what the denoiser predicts
    prior: Literal["gaussian", "corpus"] = "gaussian"  # the noise that it starts from
    linear_guess: bool = False  # begin with a regression
    canonical: bool = False  # vectors in canonical SVD form
    corpus: str = MAIN  # main, or a name of `corpora`
    seed: int = 0  # of the training

    @property
    def parts(self) -> Variant:
        """The run that trains what this one shares with others: same rows, same form."""
        shared = Variant(corpus=self.corpus, people=self.people, canonical=self.canonical)
        return replace(shared, code_space="latent" if self.code_space == "latent" else "pca")


@dataclass(frozen=True)
class AblationConfig:
    """The whole of `jobs/ablate.py`.

    evaluation: corpus, held-out people, output, pictures; its `synthesizers` are not used.
    training: what all runs have in common; its `corpus`, `output`, seeds and what `reference` names are overridden.
    reference: the run that all others differ from by one factor.
    factors: which of FACTORS are varied. people: sizes of the corpus besides all of it. code_spaces: those compared; raw
        vectors take many times as long as the others.
    corpora: other corpora of the same people, such as frozen_A: runs/tiny/corpus_frozen.
    seeds: of the main comparisons (`main_factors`); the others have `other_seeds`.
    """

    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(output="runs/tiny/ablations", scales=(1.0, 2.0), diversity_people=0)
    )
    training: TrainConfig = field(default_factory=TrainConfig)
    reference: Variant = field(default_factory=Variant)
    factors: tuple[str, ...] = FACTORS
    main_factors: tuple[str, ...] = (
        "conditioning",
        "code_space",
        "people",
        "prediction_type",
    )  # these have `seeds` runs
    people: tuple[int, ...] = (250, 500, 1000)
    code_spaces: tuple[Kind, ...] = KINDS  # those compared
    corpora: dict[str, Place] = field(default_factory=dict)
    seeds: int = 3
    other_seeds: int = 3  # runs of each value of the other factors

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.factors, *self.main_factors) if name not in FACTORS]
        if unknown:
            raise ValueError(f"unknown factors {', '.join(unknown)}; choose from {', '.join(FACTORS)}")
        if self.seeds < 1 or self.other_seeds < 1:
            raise ValueError("seeds and other_seeds must be at least 1")

    @property
    def output(self) -> str:
        return self.evaluation.output

    def corpus_of(self, variant: Variant) -> str:
        return self.evaluation.corpus if variant.corpus == MAIN else self.corpora[variant.corpus]


def values_of(config: AblationConfig, factor: str, available: int) -> list[Any]:
    """What a factor is set to, the reference's own value among them. `available`: people in the corpus."""
    found: dict[str, list[Any]] = {
        "conditioning": ["adanorm", "adalora"],
        "code_space": [kind for kind in reversed(KINDS) if kind in (*config.code_spaces, config.reference.code_space)],
        "people": [count for count in sorted(config.people) if count < available] + [None],
        "prediction_type": ["epsilon", "sample", "v_prediction"],
        "prior": ["gaussian", "corpus"],
        "linear_guess": [False, True],
        "canonical": [False, True],
        "corpus": [MAIN, *config.corpora],
    }
    return found[factor]


def plan(config: AblationConfig, available: int) -> list[Variant]:
    """All runs, each once: seed by seed, so that an early stop leaves whole comparisons."""
    runs: dict[Variant, None] = {}
    for seed in range(max(config.seeds, config.other_seeds)):
        for factor in config.factors:
            limit = config.seeds if factor in config.main_factors else config.other_seeds
            values = values_of(config, factor, available)
            if seed < limit and len(values) > 1:
                runs |= {replace(config.reference, **{factor: value}, seed=seed): None for value in values}
        if seed < config.seeds:
            runs[replace(config.reference, seed=seed)] = None
    return sorted(runs, key=lambda run: (run.seed, run != replace(config.reference, seed=run.seed)))


def run_name(config: AblationConfig, variant: Variant) -> str:
    """What a run's folder is called: readable, and with 8 hex digits over all that decides its weights."""
    values = asdict(variant)
    changed = [("" if values[name] else "no_") + name if isinstance(values[name], bool) else f"{values[name]}" for name in FACTORS
               if values[name] != getattr(config.reference, name)]  # fmt: skip
    content = {
        "variant": values,
        "training": to_dict(replace(config.training, output="", corpus="", workers=type(config.training.workers)())),
        "corpus": replace(take_snapshot(config.corpus_of(variant)), uri="").key,  # wherever it lies
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return "-".join([*(changed or ["reference"]), f"seed{variant.seed}", digest])


def train_parts(config: AblationConfig, variant: Variant) -> str:
    """Statistics, PCA and, for latents, the VAE of a variant's rows; returns their folder. Nothing to do if it is there."""
    shared = variant.parts
    name = f"parts/{run_name(config, shared)}"
    store = open_store(f"{config.output}/{name}")
    snapshot, rows = variant_rows(config, shared)
    for stage in ("pca", "vae") if shared.code_space == "latent" else ("pca",):
        training = replace(config.training, stage=stage, code_space=shared.code_space, tensorboard=False)
        SynthesizerTraining(training, snapshot, rows, store, say=lambda line: None).run()
    return name


def train_run(config: AblationConfig, variant: Variant) -> dict[str, Any]:
    """Train one run, or read what it left. Returns the record without similarities."""
    name = run_name(config, variant)
    store = open_store(f"{config.output}/runs/{name}")
    if store.exists("run.json"):
        return dict(store.read_json("run.json"))
    parts = open_store(f"{config.output}/{train_parts(config, variant)}")
    for file in _shared_files(parts):
        if not store.exists(file):
            store.write(file, parts.read(file))
    snapshot, rows = variant_rows(config, variant)
    training = training_of(config, variant, code_size(config, parts, variant))
    SynthesizerTraining(training, snapshot, rows, store, say=lambda line: None).run()
    model = Synthesizer.from_pretrained(f"{store.uri}/synthesizer")
    record = {
        "name": name,
        "variant": asdict(variant),
        "rows": len(rows.train),
        "code_size": model.code_size,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "figures": model.provenance.figures,
        "curve": [
            {key: line[key] for key in ("step", "loss", "validation_loss", "validation_rank") if key in line}
            for line in read_metrics(store)
            if line["stage"] == "denoiser"
        ],
    }
    for file in (*_shared_files(parts), "checkpoints/denoiser.safetensors", "checkpoints/denoiser-best.safetensors"):
        store.delete(file)  # the synthesiser holds what is needed
    store.write_json("run.json", record)
    return record


def training_of(config: AblationConfig, variant: Variant, size: int) -> TrainConfig:
    """The training of one run, for codes of `size` numbers."""
    base = config.training
    denoiser = replace(base.denoiser, conditioning="adanorm", linear_guess=variant.linear_guess)
    return replace(
        base,
        stage="denoiser",
        code_space=variant.code_space,
        denoiser=denoiser if variant.conditioning == "adanorm" else equal_parameters(denoiser, size),
        diffusion=replace(base.diffusion, prediction_type=variant.prediction_type, prior=variant.prior),
        denoiser_training=replace(base.denoiser_training, seed=variant.seed),
        keep_neighbours=False,
        tensorboard=False,
    )


def equal_parameters(adanorm: DenoiserConfig, size: int) -> DenoiserConfig:
    """ADALoRA with as many parameters as `adanorm`, as near as its rank and generator width allow (1 %, else 5 %).

    Codes much longer than the network is wide (raw vectors) leave no room for that, since ADALoRA conditions the first and
    the last layer too: there it gets the rank and generator width that are equal for codes as long as the network is wide.
    """
    try:
        return with_equal_parameters(adanorm, size)
    except ValueError:
        if size > 4 * adanorm.width:
            return equal_parameters(adanorm, adanorm.width)
        return with_equal_parameters(adanorm, size, tolerance=0.05)


def variant_rows(config: AblationConfig, variant: Variant) -> tuple[CorpusSnapshot, CorpusRows]:
    """The rows that a variant learns from."""
    snapshot = take_snapshot(config.corpus_of(variant))
    rows = open_rows(snapshot, replace(config.training.data, max_people=variant.people))
    return snapshot, canonical_rows(rows, LoRALayout.from_dict(snapshot.layout)) if variant.canonical else rows


def canonical_rows(rows: CorpusRows, layout: LoRALayout) -> CorpusRows:
    """The same rows with vectors in canonical SVD form, signs by the mean of the training rows; all in memory."""
    reference_N = torch.cat([chunk.sum(0, keepdim=True) for chunk in rows.chunks(rows.train)]).sum(0) / len(rows.train)
    vectors_PN = np.zeros(rows.vectors_PN.shape, np.float32)
    for slots in _pieces(np.concatenate([rows.train, rows.validation])):
        vectors_PN[slots] = canonicalize(rows.vectors(slots), layout, reference_N).numpy()
    again = copy.copy(rows)
    again.vectors_PN = vectors_PN
    return again


def code_size(config: AblationConfig, parts: Store, variant: Variant) -> int:
    """Z of a variant, from what `train_parts` left."""
    if variant.code_space == "latent":
        return config.training.vae.latent_size
    if variant.code_space == "pca":
        saved = unpack(parts, "pca.safetensors")
        assert saved is not None
        return len(PCA.from_tensors(saved[0]))
    return Normaliser.from_statistics(Statistics.from_bytes(parts.read("statistics.safetensors"))).size


def _shared_files(parts: Store) -> list[str]:
    checkpoints = [f"checkpoints/{name}" for name in parts.files("checkpoints")]
    return [*(name for name in ("statistics.safetensors", "pca.safetensors") if name in parts.files()), *checkpoints]


def _pieces(slots: np.ndarray, size: int = 128) -> Iterator[np.ndarray]:
    for start in range(0, len(slots), size):
        yield slots[start : start + size]


def distinct_parts(runs: Sequence[Variant]) -> list[Variant]:
    """One run for each set of parts, so that they are trained before those who share them."""
    return list({run.parts: run for run in reversed(runs)}.values())
