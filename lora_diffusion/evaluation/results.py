"""Scores of all methods -> the figures of `results.json`: means with 95 % bootstrap intervals over people.

A method's scale (of the deviation from the corpus' mean) is chosen on half of the people and reported on the other half,
and the other way round: `best_scale` is what a user gets who tunes this one number, without having seen the answer.

Axes: K people, R recognisers, H parts of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lora_diffusion.evaluation.held_out import Floats, HeldOut
from lora_diffusion.evaluation.methods import RECONSTRUCTED, SYNTHESISED, Method
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.evaluation.similarity import bootstrap
from lora_diffusion.lora.rendering import PROMPT_PARTS


def method_figures(scores: Scores, names: Sequence[str]) -> dict[str, Any]:
    """Everything that one method's scores say, by recogniser. `names`: of the recognisers."""
    accuracy_KH = scores.prompt_accuracy_KH()
    asked = np.asarray(np.isfinite(accuracy_KH).all(0))
    figures: dict[str, Any] = {"people": len(scores.people_K), "pictures": scores.cosines_KRTJ.shape[2], "by": {}}
    for r, name in enumerate(names):
        entry = {
            "similarity": interval(scores.similarity_K(r)),
            "others": interval(scores.others_K(r)),
            "rank1": interval(scores.rank1_K(r)),
            "faces_found": float(scores.found_KRT[:, r].mean()),
        }
        various_K = scores.diversity_KR[:, r]
        if np.isfinite(various_K).any():  # of whom two samples show a face
            entry["diversity"] = interval(various_K[np.isfinite(various_K)])
        figures["by"][name] = entry
    if asked.any():
        figures["prompt_accuracy"] = {
            "all": interval(accuracy_KH[:, asked].mean(1)),
            **{head: interval(accuracy_KH[:, h]) for h, head in enumerate(PROMPT_PARTS) if asked[h]},
        }
    return figures


def interval(values_K: Floats) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(bootstrap(values_K)).items()}


def compare(a_K: Floats, b_K: Floats) -> dict[str, float]:
    """a - b of the same people, with its interval: apart where the interval leaves 0 out."""
    return interval(np.asarray(a_K) - np.asarray(b_K))


def interval_of_runs(values_SK: Floats, others_SK: Floats | None = None, samples: int = 4000) -> dict[str, float]:
    """Mean of several runs (seeds) of the same people, or its difference from other runs', with a 95 % interval.

    The bootstrap draws seeds as well as people, the seeds of the two sides apart: a difference that another seed could
    have made is not taken for one of the settings. With three seeds it is a rough estimate, and rather too narrow; with
    one, the seeds' part is unknown and left out.
    """
    rng = np.random.default_rng(0)
    people = rng.integers(values_SK.shape[1], size=(samples, 1, values_SK.shape[1]))

    def draws(runs_SK: Floats) -> Floats:
        seeds = rng.integers(len(runs_SK), size=(samples, len(runs_SK), 1))
        return np.asarray(np.asarray(runs_SK, np.float64)[seeds, people].mean((1, 2)))

    means, mean = draws(values_SK), float(values_SK.mean())
    if others_SK is not None:
        means, mean = means - draws(others_SK), mean - float(others_SK.mean())
    low, high = (round(float(x), 5) for x in np.percentile(means, [2.5, 97.5]))
    return {"mean": round(mean, 5), "low": low, "high": high}


def share_of_gain(method_K: Floats, base_K: Floats, ceiling_K: Floats, samples: int = 2000) -> dict[str, float | None]:
    """(method - base) / (ceiling - base) of the means, with its interval; people are drawn for all three together.

    None where the ceiling is not above the base; no interval where that is so in some draws.
    """
    m, b, c = (np.asarray(x, np.float64) for x in (method_K, base_K, ceiling_K))
    if (c - b).mean() <= 0:
        return {"mean": None, "low": None, "high": None}
    share = round(float((m - b).mean() / (c - b).mean()), 4)
    draws = np.random.default_rng(0).integers(len(m), size=(samples, len(m)))
    gained, possible = (m - b)[draws].mean(1), (c - b)[draws].mean(1)
    if (possible <= 0).any():
        return {"mean": share, "low": None, "high": None}
    low, high = np.percentile(gained / possible, [2.5, 97.5])
    return {"mean": share, "low": round(float(low), 4), "high": round(float(high), 4)}


def cross_fitted(by_scale: Mapping[float, Floats], chooser: int = 0) -> tuple[Floats, list[float]]:
    """(R, K) similarity at the scale that was best for the other half of the people, by recogniser `chooser`, and the two
    scales that were chosen. `by_scale`: similarities (R, K) at each scale."""
    scales = sorted(by_scale)
    similarity_SRK = np.stack([by_scale[scale] for scale in scales])
    values_RK: Floats = np.empty_like(similarity_SRK[0])
    chosen = []
    halves = np.arange(values_RK.shape[1]) % 2
    for half in (0, 1):
        best = int(similarity_SRK[:, chooser, halves != half].mean(1).argmax())
        values_RK[:, halves == half] = similarity_SRK[best][:, halves == half]
        chosen.append(float(scales[best]))
    return values_RK, chosen


def similarities(scores: Scores) -> Floats:
    """(R, K) similarity to the own gallery, by each recogniser."""
    return np.stack([scores.similarity_K(r) for r in range(scores.cosines_KRTJ.shape[1])])


def tabulate(
    methods: Sequence[Method],
    scores: Mapping[str, Scores],
    held: HeldOut,
    names: Sequence[str],
    reference: str,
) -> dict[str, Any]:
    """The whole table, scores by `Method.id`. `reference`: name of the synthesiser that others are compared with."""
    table: dict[str, Any] = {}
    by_name: dict[str, dict[float, Scores]] = {}
    for method in methods:
        if method.vectors_KSN.shape[1] == 1:
            by_name.setdefault(method.name, {})[method.scale] = scores[method.id]
    plain = {name: found[1.0] for name, found in by_name.items()}
    fitted = {
        name: cross_fitted({scale: similarities(one) for scale, one in found.items()})
        for name, found in by_name.items()
        if len(found) > 1
    }
    best = {name: values_RK for name, (values_RK, _) in fitted.items()}
    for name, found in by_name.items():
        entry = method_figures(plain[name], names)
        if name in best:
            entry["scales"] = {
                f"{scale:g}": {r: interval(found[scale].similarity_K(i)) for i, r in enumerate(names)}
                for scale in sorted(found)
            }
            entry["best_scale"] = {
                "chosen": fitted[name][1],
                **{r: interval(best[name][i]) for i, r in enumerate(names)},
            }
        for i, r in enumerate(names):
            own = plain[name].similarity_K(i)
            entry["by"][r]["share_of_gain"] = share_of_gain(
                own, plain["base"].similarity_K(i), plain["finetuned"].similarity_K(i)
            )
            if name in best:
                ceiling = plain["finetuned"].similarity_K(i)
                entry["best_scale"][f"{r}_share_of_gain"] = share_of_gain(
                    best[name][i], plain["base"].similarity_K(i), ceiling
                )
            if reference in plain and name != reference and not name.startswith(RECONSTRUCTED):
                entry["by"][r]["reference_minus_this"] = compare(plain[reference].similarity_K(i), own)
                if name in best and reference in best:
                    entry["best_scale"][f"{r}_reference_minus_this"] = compare(best[reference][i], best[name][i])
        table[name] = entry
    for method in methods:
        if method.vectors_KSN.shape[1] > 1:
            figures = method_figures(scores[method.id], names)
            table[method.name]["diversity"] = {
                "samples": method.vectors_KSN.shape[1],
                "people": figures["people"],
                **{r: found["diversity"] for r, found in figures["by"].items() if "diversity" in found},
            }
    photos = {r: interval(values) for r, values in zip(names, held.photo_similarity_RK, strict=True) if _finite(values)}
    return {"methods": table, "photos": photos, "reference": reference if reference in table else None}


def _finite(values: Floats) -> bool:
    return bool(np.isfinite(values).all())


def is_main(name: str) -> bool:
    """Whether a method belongs to the main comparison (not a reconstruction)."""
    return not name.startswith(RECONSTRUCTED)


def order(names: Sequence[str]) -> list[str]:
    """Controls first, then baselines, synthesisers, and what is fine-tuned."""
    fixed = ["base", "other", "mean", "nearest", "ridge_vector", "ridge_pca"]
    synthesised = [name for name in names if name.startswith(SYNTHESISED)]
    rest = [name for name in names if name.startswith(RECONSTRUCTED)]
    return [name for name in (*fixed, *synthesised, "finetuned", *rest) if name in names]
