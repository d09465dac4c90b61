"""Every method as LoRA vectors for the held-out people: controls, baselines, synthesisers, and the fine-tuned ceiling.

Axes: K held-out people, S LoRAs of one person, N vector length, C embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.config import to_dict
from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.evaluation.held_out import Floats, HeldOut
from lora_diffusion.synthesis.baselines import RidgeToPCA, RidgeToVector, nearest_rows, principal_components
from lora_diffusion.synthesis.codes import reconstruction
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.dataset import CorpusRows

SYNTHESISED, RECONSTRUCTED = "synthesised", "reconstructed"
LABELS = {
    "base": "base model, no LoRA",
    "other": "another person's fine-tuned LoRA",
    "mean": "mean LoRA of the corpus",
    "nearest": "nearest neighbour in the corpus",
    "ridge_vector": "ridge regression to the vector",
    "ridge_pca": "ridge regression to PCA",
    "finetuned": "fine-tuned on the photos",
}
UNSCALED = ("base", "other", "mean")  # methods whose distance from the mean says nothing


@dataclass(frozen=True, eq=False)
class Method:
    """`scale`: factor of the deviation from the corpus' mean, 1 for the method as it is. `people_K`: whose they are."""

    name: str
    vectors_KSN: Floats
    people_K: NDArray[np.int64]
    scale: float = 1.0

    @classmethod
    def of(cls, name: str, vectors_KN: Floats) -> Method:
        """One LoRA for each of all people."""
        return cls(name, np.asarray(vectors_KN, np.float32)[:, None], np.arange(len(vectors_KN)))

    @property
    def label(self) -> str:
        return label(self.name)

    @property
    def id(self) -> str:
        """Name among the scores: `ridge_pca`, or `ridge_pca@1.5` where it is scaled, or `...#4` for several LoRAs each."""
        samples = self.vectors_KSN.shape[1]
        return self.name + (f"@{self.scale:g}" if self.scale != 1 else "") + (f"#{samples}" if samples > 1 else "")

    def scaled(self, scale: float, mean_N: Floats) -> Method:
        """The same with `scale` times the deviation from the corpus' mean."""
        return replace(
            self, scale=scale, vectors_KSN=mean_N + np.float32(scale / self.scale) * (self.vectors_KSN - mean_N)
        )


def label(name: str) -> str:
    """What a person reads."""
    kind, _, rest = name.partition(":")
    if kind == SYNTHESISED:
        return f"synthesised, {rest}"
    if kind == RECONSTRUCTED:
        return f"fine-tuned, through {rest} and back"
    return LABELS.get(name, name)


def controls_and_baselines(
    rows: CorpusRows, held: HeldOut, components: int = 512
) -> tuple[list[Method], dict[str, Any]]:
    """Everything that needs no synthesiser, and what is worth telling about it: penalties, explained variance.

    Fitted on the corpus' training rows, settings chosen on its validation rows: as a synthesiser does.
    """
    train, validation = rows.train, rows.validation
    conditions_KC = torch.from_numpy(held.conditions_KC)
    statistics = Statistics.merged(
        (Statistics.of(chunk.numpy()) for chunk in rows.chunks(train)), held.vectors_KN.shape[1]
    )
    normaliser = Normaliser.from_statistics(statistics)
    pca = principal_components(normaliser, lambda: rows.chunks(train), components)

    def pairs(slots: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(slots), 256):
            part = slots[start : start + 256]
            yield rows.embeddings(part), rows.vectors(part)

    to_vector = RidgeToVector.fit(lambda: pairs(train), lambda: pairs(validation))
    to_pca = RidgeToPCA.fit(lambda: pairs(train), lambda: pairs(validation), normaliser, pca)
    nearest_K = train[nearest_rows(conditions_KC, rows.embeddings(train)).numpy()]
    mean_N = normaliser.mean_N.numpy()
    methods = [
        Method.of("base", np.zeros_like(held.vectors_KN)),
        Method.of("mean", np.tile(mean_N, (len(held), 1))),
        Method.of("other", np.roll(held.vectors_KN, 1, axis=0)),
        Method.of("nearest", rows.vectors(nearest_K).numpy()),
        Method.of("ridge_vector", to_vector.predict(conditions_KC).numpy()),
        Method.of("ridge_pca", to_pca.predict(conditions_KC).numpy()),
        Method.of("finetuned", held.vectors_KN),
    ]
    facts = {
        "rows": {"train": len(train), "validation": len(validation), "left_out": rows.left_out},
        "varying_parameters": normaliser.size,
        "ridge_vector": {"penalty": to_vector.ridge.penalty, "validation_cosine": to_vector.cosine},
        "ridge_pca": {
            "penalty": to_pca.ridge.penalty,
            "components": to_pca.components,
            "validation_cosine": to_pca.cosine,
        },
        "explained_variance": {"rows": len(train), "cumulative": pca.curve()},
    }
    return methods, facts


def synthesised(
    name: str, model: Synthesizer, held: HeldOut, config: EvaluationConfig
) -> tuple[list[Method], dict[str, Any]]:
    """What one synthesiser gives: one LoRA each, several each of a few people, and the fine-tuned ones through its code
    space and back."""
    settings = drawing(config)
    vectors_KN = model.from_embedding(held.conditions_KC, seed=config.seed, **settings)
    few = min(config.diversity_people, len(held))
    methods = [
        Method.of(f"{SYNTHESISED}:{name}", vectors_KN),
        Method.of(f"{RECONSTRUCTED}:{name}", model.decode(model.encode(held.vectors_KN))),
    ]
    if few:
        samples = model.from_embedding(
            held.conditions_KC[:few], num_samples=config.diversity_samples, seed=config.seed + 1, **settings
        )
        shape = (few, config.diversity_samples, samples.shape[1])
        methods.append(Method(f"{SYNTHESISED}:{name}", samples.reshape(shape), np.arange(few)))
    found = reconstruction(model.codes, [torch.from_numpy(held.vectors_KN)])
    facts = {
        "codes": model.codes.kind,
        "code_size": model.code_size,
        "conditioning": model.denoiser.config.conditioning,
        "prediction_type": model.diffusion.config.prediction_type,
        "latent_sampling": to_dict(model.latent_sampling) | {k: v for k, v in settings.items() if v is not None},
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "reconstruction": found.to_dict(),
        "figures": model.provenance.figures,
    }
    return methods, facts


def drawing(config: EvaluationConfig) -> dict[str, Any]:
    """How every synthesiser is drawn from, as arguments of `from_embedding`."""
    return {name: getattr(config, name) for name in ("guidance_scale", "num_inference_steps", "temperature")}


def check_fit(models: Mapping[str, Synthesizer], reader: CorpusReader) -> None:
    """Raises ValueError for a synthesiser of another layout, base model, recogniser or start than the corpus."""
    for name, model in models.items():
        corpus, identity = f"the corpus at {reader.store.uri}", reader.manifest.identity
        identity.check(model.identity, corpus, f"the synthesiser {name!r}", "Train it on this corpus")


def with_scales(methods: Iterable[Method], scales: Sequence[float], mean_N: Floats) -> list[Method]:
    """Each method at each scale, where a scale means something."""
    found = []
    for method in methods:
        several = method.vectors_KSN.shape[1] > 1
        plain = method.name in UNSCALED or method.name.startswith(RECONSTRUCTED) or several
        found += [method] if plain else [method if s == 1 else method.scaled(s, mean_N) for s in scales]
    return found
