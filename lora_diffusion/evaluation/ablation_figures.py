"""The ablations in the report: figures and tables of what jobs/ablate.py measured."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_diffusion.evaluation.figures import INK, MUTED, SYNTHESISERS, canvas, png, text
from lora_diffusion.evaluation.page import figure, section, table

TITLES = {
    "conditioning": "conditioning, at equal parameters",
    "code_space": "what the denoiser works in",
    "people": "size of the corpus",
    "prediction_type": "what the denoiser predicts",
    "prior": "noise of the start",
    "linear_guess": "where the network begins",
    "canonical": "form of the vectors",
    "corpus": "recipe of the corpus",
}
Rows = Sequence[Mapping[str, Any]]


def draw(results: Mapping[str, Any], records: Rows) -> dict[str, bytes]:
    """Name -> PNG of what the results allow."""
    rows, names = results["table"], results["recognisers"]
    found = {"ablations": overview(rows, records, names)} if rows else {}
    factors = {row["factor"] for row in rows}
    if "code_space" in factors:
        found["spaces"] = spaces(rows, records, names, results["config"]["reference"])
    if "conditioning" in factors:
        found["conditioning"] = conditioning(rows, names)
    if "people" in factors:
        found["corpus_size"] = corpus_size(rows, records, names)
    return found


def overview(rows: Rows, records: Rows, names: Sequence[str]) -> bytes:
    """Every value of every factor: mean, interval over people, seeds; lines: controls."""
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for factor in dict.fromkeys(row["factor"] for row in rows):
        lines.append((TITLES[factor], None))
        lines += [(row["value"], row) for row in rows if row["factor"] == factor]
    fig, panels = canvas(9.6, 0.8 + 0.23 * len(lines), len(names), share_y=True)
    for panel, name in zip(panels, names, strict=True):
        for i, (_, row) in enumerate(lines):
            if row is not None:
                colour = SYNTHESISERS[0] if row["reference"] else INK
                _dots(panel, row["best"][name], i, colour)
        _controls(panel.axvline, records, name)
        panel.grid(axis="y", visible=False)
        text(panel, "similarity (cosine), best scale", title=f"recogniser {name}")
    panels[0].set_yticks(range(len(lines)), [label for label, _ in lines])
    for tick, (_, row) in zip(panels[0].get_yticklabels(), lines, strict=True):
        if row is None:
            tick.set_fontweight("bold")
        elif row["reference"]:
            tick.set_color(SYNTHESISERS[0])
    panels[0].set_ylim(len(lines) - 0.4, -0.6)
    return png(fig)


def spaces(rows: Rows, records: Rows, names: Sequence[str], reference: Mapping[str, Any]) -> bytes:
    """The paper's Figure 5: the loss, and the similarity on people never seen, of vectors against latents.

    Between them, what chose the weights: how near the drawn codes of validation people are to their own.
    """
    fig, panels = canvas(12.8, 3.2, 3)
    mine = [row for row in rows if row["factor"] == "code_space"]
    colours = {"vector": INK, "pca": SYNTHESISERS[4], "latent": SYNTHESISERS[0]}
    for row in mine:
        colour, kind = colours[row["setting"]], row["setting"]
        curves = [
            record["curve"]
            for record in records
            if record.get("variant") and _same(record["variant"], {**reference, "code_space": kind})
        ]
        for i, curve in enumerate(curves):
            for panel, key in zip(panels, ("validation_loss", "validation_rank"), strict=False):
                points = [(point["step"], point[key]) for point in curve if key in point]
                if points:
                    panel.plot(
                        *zip(*points, strict=True), color=colour, lw=1.4, alpha=0.8, label=None if i else row["value"]
                    )
    text(panels[0], "step", "validation loss, unit-variance codes", "loss")
    text(panels[1], "step", "percentile rank (0 best, 0.5 chance)", "validation people by their drawn codes")
    panels[0].legend(fontsize=8, frameon=False)
    _groups(panels[2], mine, names)
    text(panels[2], "", "similarity (cosine), best scale", "people never seen")
    return png(fig)


def conditioning(rows: Rows, names: Sequence[str]) -> bytes:
    """AdaNorm against ADALoRA at equal parameters, with the difference of the same people."""
    mine = [row for row in rows if row["factor"] == "conditioning"]
    fig, (panel,) = canvas(5.6, 3.2)
    _groups(panel, mine, names)
    changed = next((row for row in mine if not row["reference"]), None)
    title = "conditioning"
    if changed and "minus_reference" in changed["best"][names[0]]:
        gap = changed["best"][names[0]]["minus_reference"]
        title += f": {changed['value']} {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}) by {names[0]}"
    text(panel, "", "similarity (cosine), best scale", title)
    return png(fig)


def corpus_size(rows: Rows, records: Rows, names: Sequence[str]) -> bytes:
    """Similarity over the people in the corpus."""
    mine = sorted((row for row in rows if row["factor"] == "people"), key=lambda row: row["rows"])
    fig, panels = canvas(9.6, 3.2, len(names), share_y=True)
    for panel, name in zip(panels, names, strict=True):
        x = [row["rows"] for row in mine]
        dots = [row["best"][name] for row in mine]
        panel.fill_between(
            x, [d["low"] for d in dots], [d["high"] for d in dots], color=SYNTHESISERS[0], alpha=0.15, lw=0
        )
        panel.plot(x, [d["mean"] for d in dots], "o-", color=SYNTHESISERS[0], lw=2)
        for row, dot in zip(mine, dots, strict=True):
            panel.plot([row["rows"]] * len(dot["seeds"]), dot["seeds"], ".", color=MUTED, markersize=4)
        _controls(panel.axhline, records, name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [f"{rows:,}" for rows in x])
        panel.minorticks_off()
        text(panel, "people that were learned from", "similarity (cosine), best scale", f"recogniser {name}")
    return png(fig)


def sections(results: Mapping[str, Any], image: Mapping[str, str]) -> list[str]:
    """HTML sections."""
    rows, names = results["table"], results["recognisers"]
    if not rows:
        return []
    captions = {
        "ablations": "One factor changed at a time. Orange: the reference. Bars: 95 % interval over people and "
        "seeds; small dots: single seeds; lines: base model (dotted), nearest neighbour (dash-dotted), fine-tuned (dashed).",
        "spaces": "Loss against steps, the rank by which weights are chosen, and what counts: similarity of renders. Neither the "
        "losses nor the ranks of different spaces are comparable in height: each has numbers and noise of its own.",
        "conditioning": "Small dots: seeds. Both networks have the same number of parameters.",
        "corpus_size": "Trained on subsets of the same corpus, the same steps.",
    }
    figures = "".join(figure(image[name], caption) for name, caption in captions.items() if name in image)
    return [section("What matters", figures + _table(rows, names))]


def _table(rows: Rows, names: Sequence[str]) -> str:
    head = ["", "seeds", "parameters", "R² of code space", *[f"best scale, {name}" for name in names],
            *[f"minus reference, {name}" for name in names], f"as it is, {names[0]}", f"rank-1, {names[0]}, best scale", "prompt, best scale"]  # fmt: skip
    body, strong, factor = [], set(), None
    for row in rows:
        if row["factor"] != factor:
            factor = row["factor"]
            body.append([f"<b>{html.escape(TITLES[factor])}</b>", *[""] * (len(head) - 1)])
        if row["reference"]:
            strong.add(len(body))
        obeyed = row["prompt_accuracy"]
        body.append(
            [
                html.escape(row["value"]),
                str(row["seeds"]),
                f"{row['parameters']:,}",
                f"{row['r2']:.2f}",
                *[_spread(row["best"][name]) for name in names],
                *[_spread(row["best"][name]["minus_reference"], "+") if "minus_reference" in row["best"][name] else ""
                  for name in names],
                f"{row['similarity'][names[0]]['mean']:.3f}",
                f"{row['rank1'][names[0]]:.2f}",
                "" if obeyed is None else f"{obeyed:.2f}",
            ]
        )  # fmt: skip
    return table(head, body, strong)


def _spread(dot: Mapping[str, Any], sign: str = "") -> str:
    return f"{dot['mean']:{sign}.3f} <small>{dot['low']:{sign}.3f} … {dot['high']:{sign}.3f}</small>"


def _dots(panel: Any, dot: Mapping[str, Any], y: float, colour: str) -> None:
    panel.plot([dot["low"], dot["high"]], [y, y], color=colour, lw=2, solid_capstyle="round")
    panel.plot(dot["seeds"], [y] * len(dot["seeds"]), ".", color=MUTED, markersize=4, zorder=3)
    panel.plot(dot["mean"], y, "o", color=colour, markersize=5.5, zorder=4)


def _groups(panel: Any, rows: Rows, names: Sequence[str]) -> None:
    """Values along x, recognisers side by side."""
    for r, name in enumerate(names):
        x = np.arange(len(rows)) + (r - (len(names) - 1) / 2) * 0.22
        colour = (SYNTHESISERS[0], SYNTHESISERS[4])[r % 2]
        for place, row in zip(x, rows, strict=True):
            dot = row["best"][name]
            panel.plot([place, place], [dot["low"], dot["high"]], color=colour, lw=2, solid_capstyle="round")
            panel.plot([place] * len(dot["seeds"]), dot["seeds"], ".", color=MUTED, markersize=4, zorder=3)
        panel.plot(
            x, [row["best"][name]["mean"] for row in rows], "o", color=colour, label=f"recogniser {name}", zorder=4
        )
    panel.set_xticks(range(len(rows)), [row["value"] for row in rows])
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.grid(axis="x", visible=False)
    panel.legend(fontsize=8, frameon=False)


def _controls(line: Any, records: Rows, recogniser: str) -> None:
    styles = {"base": ":", "nearest": "-.", "finetuned": "--"}
    for record in records:
        if not record.get("variant") and record["name"] in styles:
            line(record["best"][recogniser]["mean"], color=MUTED, lw=0.9, ls=styles[record["name"]], zorder=0)


def _same(variant: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(variant[key] == value for key, value in wanted.items() if key != "seed")
