"""`report.html`: the results as one file that needs nothing beside it, and the contact sheets."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_diffusion.evaluation import ablation_figures, figures
from lora_diffusion.evaluation.held_out import HeldOut
from lora_diffusion.evaluation.methods import RECONSTRUCTED, Method, label
from lora_diffusion.evaluation.page import card, embedded, figure, page, section, table
from lora_diffusion.evaluation.results import is_main, order
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.evaluation.sheet import Column, contact_sheet, photo_column
from lora_diffusion.storage import Store

Ablations = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]


def write_report(
    store: Store,
    results: Mapping[str, Any],
    held: HeldOut,
    methods: Sequence[Method],
    scores: Mapping[str, Scores],
    ablations: Ablations | None = None,
) -> None:
    """report.html, contact_sheet.png and every figure as a file of its own. `ablations`: `ablations.json` and the records
    of jobs/ablate.py."""
    pictures = {"contact_sheet": sheet(results, held, methods, scores), **draw(results, ablations)}
    for name, data in pictures.items():
        store.write(f"{name}.png", data)
    store.write("report.html", html_report(results, pictures, ablations).encode())


def draw(results: Mapping[str, Any], ablations: Ablations | None) -> dict[str, bytes]:
    """Name -> PNG of the figures that these results allow."""
    found = {
        "similarity": figures.similarity(results),
        "rank1_and_prompts": figures.prompts(results),
        "scales": figures.scales(results),
        "explained_variance": figures.explained_variance(results["facts"]),
        **(ablation_figures.draw(*ablations) if ablations else {}),
    }
    return {name: data for name, data in found.items() if data is not None}


def sheet(results: Mapping[str, Any], held: HeldOut, methods: Sequence[Method], scores: Mapping[str, Scores]) -> bytes:
    """Photo, base, fine-tuned, synthesised (as it is, and at its best scale), nearest neighbour, other person."""
    reference = results["reference"]
    wanted: list[tuple[str, float]] = [("base", 1.0), ("finetuned", 1.0)]
    if reference is not None:
        wanted.append((reference, 1.0))
        chosen = results["methods"][reference].get("best_scale", {}).get("chosen", [1.0])[0]
        wanted += [(reference, chosen)] if chosen != 1 else []
    wanted += [("nearest", 1.0), ("other", 1.0)]
    columns = [photo_column(held)]
    for name, scale in wanted:
        method = next(m for m in methods if m.name == name and m.scale == scale and m.vectors_KSN.shape[1] == 1)
        title = label(name) + (f", scale {scale:g}" if scale != 1 else "")
        columns.append(Column.of(title, scores[method.id]))
    return contact_sheet(columns, min(len(column.pictures_KPHWC) for column in columns))


def html_report(results: Mapping[str, Any], pictures: Mapping[str, bytes], ablations: Ablations | None = None) -> str:
    """One HTML file, pictures inside."""
    image = embedded(pictures)
    people, names = results["held_out"]["people"], results["recognisers"]
    parts = [
        section("In short", _cards(results)),
        section(
            "What it looks like",
            figure(
                image["contact_sheet"],
                "Held-out people: one photo is the input, each row the same prompts and noise for every method. Below each: "
                f"mean similarity to the person's other photos, recogniser {names[0]}.",
            ),
        ),
        section(
            "All methods",
            _method_table(results)
            + figure(
                image["similarity"],
                f"{people} held-out people, 95 % bootstrap intervals over people. Filled: as it is. Open: at the scale of the "
                "deviation from the corpus' mean that was best for the other half of the people.",
            )
            + figure(
                image["rank1_and_prompts"],
                "Rank-1: the person's own photos are nearest among all held-out people. "
                "Prompt: share of five attributes of the scene that a classifier finds as asked for.",
            ),
        ),
    ]
    if "scales" in image:
        parts.append(
            section("How far from the mean", figure(image["scales"], "Every method with its deviation from the corpus' mean multiplied."))
        )  # fmt: skip
    parts.append(
        section(
            "The space",
            figure(image["explained_variance"], "The paper's Figure 3 on this corpus.")
            + _reconstruction_table(results),
        )
    )
    if ablations:
        parts += ablation_figures.sections(ablations[0], image)
    settings = {key: results[key] for key in ("config", "corpus", "versions", "facts")}
    settings["facts"] = {k: v for k, v in settings["facts"].items() if k != "explained_variance"}
    parts.append(
        section("Settings", f"<details><summary>configuration, versions, facts</summary><pre>{html.escape(json.dumps(settings, indent=2))}</pre></details>")
    )  # fmt: skip
    subtitle = (
        f"{people} held-out people · {results['date']} · commit {results['commit'] or 'unknown'} · {results['machine']}"
    )
    return page("LoRA synthesis on people never seen", subtitle, parts)


def _cards(results: Mapping[str, Any]) -> str:
    reference, entries, names = results["reference"], results["methods"], results["recognisers"]
    if reference is None:
        return "<p>No synthesiser was given: controls, baselines and the fine-tuned LoRAs only.</p>"
    found, cards = entries[reference], []
    for name in names:
        share = found["by"][name]["share_of_gain"]
        best = found.get("best_scale", {}).get(f"{name}_share_of_gain")
        note = f"of the fine-tuned LoRAs' gain over the base model, by {name}"
        if best and best["mean"] is not None:
            note += f"; {best['mean']:.0%} at the best scale"
        value, span = percent(share)
        cards.append(card(value or "no gain", note, span))
    rank1 = found["by"][names[0]]["rank1"]
    cards.append(card(f"{rank1['mean']:.2f}", f"rank-1 among {results['held_out']['people']} people, by {names[0]}",
                      f"{rank1['low']:.2f} to {rank1['high']:.2f}"))  # fmt: skip
    if "prompt_accuracy" in found:
        accuracy, base = found["prompt_accuracy"]["all"], entries["base"]["prompt_accuracy"]["all"]
        cards.append(card(f"{accuracy['mean']:.2f}", f"of the scene as asked for; base model {base['mean']:.2f}",
                          f"{accuracy['low']:.2f} to {accuracy['high']:.2f}"))  # fmt: skip
    return f"<div class='cards'>{''.join(cards)}</div>"


def _method_table(results: Mapping[str, Any]) -> str:
    entries, names = results["methods"], results["recognisers"]
    head = ["method", *[f"similarity, {name}" for name in names], *[f"share of gain, {name}" for name in names],
            "rank-1", "prompt", *[f"best scale, {name}" for name in names]]  # fmt: skip
    rows = []
    for method in order(list(entries)):
        entry = entries[method]
        best = entry.get("best_scale", {})
        rows.append(
            [
                label(method),
                *[spread(entry["by"][name]["similarity"]) for name in names],
                *["{} <small>{}</small>".format(*percent(entry["by"][name]["share_of_gain"])) for name in names],
                f"{entry['by'][names[0]]['rank1']['mean']:.2f}",
                f"{entry['prompt_accuracy']['all']['mean']:.2f}" if "prompt_accuracy" in entry else "",
                *[spread(best[name]) if name in best else "" for name in names],
            ]
        )
    photos = [spread(results["photos"][name]) if name in results["photos"] else "" for name in names]
    rows.append(["<i>photos among themselves</i>", *photos, *[""] * (len(head) - 1 - len(names))])
    strong = {i for i, method in enumerate(order(list(entries))) if method == results["reference"]}
    return table(head, rows, strong)


def _reconstruction_table(results: Mapping[str, Any]) -> str:
    entries, name = results["methods"], results["recognisers"][0]
    rows = []
    for model, facts in results["facts"].get("synthesizers", {}).items():
        there = entries[f"{RECONSTRUCTED}:{model}"]["by"][name]["similarity"]
        variety = next(
            (e["diversity"][name] for n, e in entries.items()
             if is_main(n) and n.endswith(f":{model}") and name in e.get("diversity", {})),
            None,
        )  # fmt: skip
        rows.append(
            [
                html.escape(model),
                f"{facts['codes']}, {facts['code_size']}",
                f"{facts['parameters']:,}",
                f"{facts['reconstruction']['r2']:.3f}",
                f"{facts['reconstruction']['relative_error']:.3f}",
                spread(there),
                spread(entries["finetuned"]["by"][name]["similarity"]),
                spread(variety) if variety else "",
            ]
        )
    if not rows:
        return ""
    head = ["synthesiser", "code space, size", "denoiser parameters", "R² of held-out vectors", "relative error",
            "similarity, through the space and back", "similarity, fine-tuned", "diversity of samples"]  # fmt: skip
    return table(head, rows)


def spread(dot: Mapping[str, float]) -> str:
    return f"{dot['mean']:.3f} <small>{dot['low']:.3f} … {dot['high']:.3f}</small>"


def percent(dot: Mapping[str, float | None]) -> tuple[str, str]:
    """A share and its interval; empty where there is no gain to have a share of, or no interval."""
    mean, low, high = (dot[key] for key in ("mean", "low", "high"))
    span = "" if low is None or high is None else f"{low:.0%} … {high:.0%}"
    return ("" if mean is None else f"{mean:.0%}"), span
