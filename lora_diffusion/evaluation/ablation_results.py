"""Runs of the ablation, drawn and scored, put side by side: each value of a factor with everything else as the reference.

A run's similarity is reported as it is and at the best scale of the deviation from the mean (cross-fitted, see
`results.py`): settings differ in how far from the mean they dare to go, and that one number is easily tuned.
Intervals are over people and seeds, both resampled; the seeds' own means are shown beside.

Axes: K people, R recognisers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_diffusion.evaluation.ablation import AblationConfig, Variant, values_of
from lora_diffusion.evaluation.held_out import Floats, HeldOut
from lora_diffusion.evaluation.methods import Method, drawing
from lora_diffusion.evaluation.results import cross_fitted, interval, interval_of_runs, method_figures, similarities
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis import Synthesizer

Record = dict[str, Any]

ABLATIONS = "ablations.jsonl"


def run_method(config: AblationConfig, record: Mapping[str, Any], held: HeldOut) -> tuple[Method, Floats]:
    """The LoRAs that a trained run makes for the held-out people, and the mean (N,) of what it learned from."""
    model = Synthesizer.from_pretrained(f"{config.output}/runs/{record['name']}/synthesizer")
    c = config.evaluation
    vectors_KN = model.from_embedding(held.conditions_KC, seed=c.seed, **drawing(c))
    return Method.of(record["name"], vectors_KN), model.codes.normaliser.mean_N.numpy()


def scored(record: Record, methods: Sequence[Method], scores: Mapping[str, Scores], names: Sequence[str]) -> Record:
    """The record with what its LoRAs look like. Similarities of single people are kept, for comparisons of the same people.

    Rank-1 and obedience to the prompt are those at the best scale, too: means of both halves' choices.
    """
    found = {m.scale: scores[m.id] for m in methods if m.name == record["name"]}
    by_scale = {scale: similarities(one) for scale, one in found.items()}
    best_RK, chosen = cross_fitted(by_scale)
    figures = method_figures(found[1.0], names)
    at_best = [method_figures(found[scale], names) for scale in chosen]
    return {
        **record,
        "recognisers": list(names),
        "similarity_RK": {f"{scale:g}": np.round(values, 5).tolist() for scale, values in sorted(by_scale.items())},
        "best_similarity_RK": np.round(best_RK, 5).tolist(),
        "best_scale": chosen,
        "similarity": {name: figures["by"][name]["similarity"] for name in names},
        "rank1": {name: float(np.mean([best["by"][name]["rank1"]["mean"] for best in at_best])) for name in names},
        "prompt_accuracy": _mean_or_none(
            [best.get("prompt_accuracy", {}).get("all", {}).get("mean") for best in at_best]
        ),
    }


def compared(config: AblationConfig, records: Sequence[Record], available: int) -> list[dict[str, Any]]:
    """One row for each value of each factor: means over its seeds, and the difference from the reference's runs with as
    many seeds, of the same people."""
    by_variant = {_variant(record): record for record in records if record.get("variant")}
    rows = []
    for factor in config.factors:
        values = values_of(config, factor, available)
        for value in values if len(values) > 1 else []:
            changed = replace(config.reference, **{factor: value})
            seeds = [s for s in range(max(config.seeds, config.other_seeds)) if replace(changed, seed=s) in by_variant]
            if not seeds:
                continue
            mine = [by_variant[replace(changed, seed=seed)] for seed in seeds]
            theirs = [by_variant.get(replace(config.reference, seed=seed)) for seed in seeds]
            is_reference = value == getattr(config.reference, factor)
            reference = None if is_reference or None in theirs else [record for record in theirs if record]
            rows.append(
                {
                    "factor": factor,
                    "setting": value,
                    "value": _name(factor, value, available),
                    "reference": is_reference,
                    "seeds": len(seeds),
                    "parameters": mine[0]["parameters"],
                    "rows": mine[0]["rows"],
                    "validation_loss": [record["figures"]["denoiser_validation_loss"] for record in mine],
                    "r2": mine[0]["figures"]["reconstruction"]["r2"],
                    **{key: _summary(key, mine, reference) for key in ("similarity", "best")},
                    "rank1": {n: float(np.mean([r["rank1"][n] for r in mine])) for n in mine[0]["recognisers"]},
                    "prompt_accuracy": _mean_or_none([record["prompt_accuracy"] for record in mine]),
                }
            )
    return rows


def _summary(key: str, mine: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, Any]:
    """By recogniser: the interval over people and seeds, each seed's mean, and the difference from the reference."""
    found = {}
    for r, name in enumerate(mine[0]["recognisers"]):
        own_SK = np.array([_values(record, key)[r] for record in mine])
        entry: dict[str, Any] = {**interval_of_runs(own_SK), "seeds": [round(float(x), 5) for x in own_SK.mean(1)]}
        if reference is not None:
            their_SK = np.array([_values(record, key)[r] for record in reference])
            entry["minus_reference"] = interval_of_runs(own_SK, their_SK)
        found[name] = entry
    return found


def _values(record: Mapping[str, Any], key: str) -> Floats:
    return np.asarray(record["best_similarity_RK"] if key == "best" else record["similarity_RK"]["1"], np.float32)


def _variant(record: Mapping[str, Any]) -> Variant:
    return Variant(**record["variant"])


def _name(factor: str, value: Any, available: int) -> str:
    if factor == "people":
        return f"{available if value is None else value:,} people"
    if factor == "canonical":
        return "canonical SVD form" if value else "as fine-tuned"
    if factor == "linear_guess":
        return "from a linear guess" if value else "from nothing"
    names = {"adalora": "ADALoRA", "adanorm": "AdaNorm", "latent": "VAE latents", "pca": "PCA coefficients",
             "vector": "raw vectors", "sample": "x0", "v_prediction": "v", "gaussian": "Gaussian prior",
             "corpus": "corpus' own prior"}  # fmt: skip
    return names.get(value, str(value))


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def control_records(methods: Sequence[Method], scores: Mapping[str, Scores], names: Sequence[str]) -> list[Record]:
    """Base, nearest neighbour, fine-tuned and the like, as records without a variant: lines to compare with."""
    found: dict[str, dict[float, Scores]] = {}
    for method in methods:
        found.setdefault(method.name, {})[method.scale] = scores[method.id]
    records = []
    for name, by_scale in found.items():
        best_RK, chosen = cross_fitted({scale: similarities(one) for scale, one in by_scale.items()})
        plain = method_figures(by_scale[1.0], names)
        records.append(
            {
                "name": name,
                "variant": None,
                "recognisers": list(names),
                "similarity": {n: plain["by"][n]["similarity"] for n in names},
                "best": {n: interval(best_RK[r]) for r, n in enumerate(names)},
                "best_scale": chosen,
            }
        )
    return records


def read_ablations(uri: str) -> tuple[dict[str, Any], list[Record]]:
    """`ablations.json` and the records of a finished run. Raises ValueError if there are none."""
    store = open_store(uri)
    try:
        records = [json.loads(line) for line in store.read(ABLATIONS).decode().splitlines()]
        return dict(store.read_json("ablations.json")), records
    except FileNotFoundError as error:
        raise ValueError(f"no ablations at {uri}: make them with jobs/ablate.py, or leave `ablations` empty") from error
