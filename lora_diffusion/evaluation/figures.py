"""The figures of the report, as PNG: similarity of all methods, scale of the deviation, explained variance.

matplotlib's object interface only: no global state, no display. Equal numbers give equal files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_diffusion.evaluation.methods import SYNTHESISED, label
from lora_diffusion.evaluation.results import is_main, order

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
CONTROL, BASELINE, CEILING = "#9aa5b1", "#5b8def", "#1f2933"
SYNTHESISERS = ("#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")


def canvas(width: float, height: float, panels: int = 1, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure with `panels` side by side, in the report's style."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'lora-diffusion[ray]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=share_y, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=0)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def text(axis: Any, x: str = "", y: str = "", title: str = "") -> None:
    axis.set_xlabel(x, fontsize=8.5, color=MUTED)
    axis.set_ylabel(y, fontsize=8.5, color=MUTED)
    axis.set_title(title, fontsize=9.5, color=INK, loc="left", fontweight="bold")


def colour(name: str, names: Sequence[str]) -> str:
    if name.startswith(SYNTHESISED):
        return SYNTHESISERS[[n for n in names if n.startswith(SYNTHESISED)].index(name) % len(SYNTHESISERS)]
    if name == "finetuned":
        return CEILING
    return BASELINE if name in ("nearest", "ridge_vector", "ridge_pca") else CONTROL


def similarity(results: Mapping[str, Any]) -> bytes:
    """Mean and interval of every method, a panel for each recogniser; open marks: at the scale chosen on other people."""
    table, recognisers = results["methods"], results["recognisers"]
    names = [name for name in order(list(table)) if is_main(name)]
    figure, panels = canvas(9.6, 1.1 + 0.34 * len(names), len(recognisers), share_y=True)
    for panel, recogniser in zip(panels, recognisers, strict=True):
        for i, name in enumerate(names):
            dot = table[name]["by"][recogniser]["similarity"]
            c = colour(name, names)
            panel.plot([dot["low"], dot["high"]], [i, i], color=c, linewidth=2.2, solid_capstyle="round")
            panel.plot(dot["mean"], i, "o", color=c, markersize=6)
            if (best := table[name].get("best_scale")) is not None:
                dot = best[recogniser]
                panel.plot([dot["low"], dot["high"]], [i + 0.28] * 2, color=c, linewidth=1.2, alpha=0.8)
                panel.plot(dot["mean"], i + 0.28, "o", markerfacecolor="white", color=c, markersize=5)
        for name, style in (("base", ":"), ("finetuned", "--")):
            panel.axvline(
                table[name]["by"][recogniser]["similarity"]["mean"],
                color=MUTED,
                linewidth=0.9,
                linestyle=style,
                zorder=0,
            )
        panel.grid(axis="y", visible=False)
        text(panel, "similarity to the person's other photos (cosine)", title=f"recogniser {recogniser}")
    panels[0].set_yticks(range(len(names)), [label(name) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return png(figure)


def scales(results: Mapping[str, Any]) -> bytes | None:
    """Similarity over the scale of the deviation from the corpus' mean."""
    table, recognisers = results["methods"], results["recognisers"]
    names = [name for name in order(list(table)) if len(table[name].get("scales", {})) > 1]
    if not names:
        return None
    figure, panels = canvas(9.6, 3.4, len(recognisers), share_y=True)
    for panel, recogniser in zip(panels, recognisers, strict=True):
        for name in names:
            points = sorted((float(scale), dots[recogniser]) for scale, dots in table[name]["scales"].items())
            x = [scale for scale, _ in points]
            c = colour(name, names)
            if c == BASELINE:  # three baselines, told apart by their dashes
                style = {"nearest": ":", "ridge_vector": "--"}.get(name, "-.")
            else:
                style = "-"
            panel.plot(x, [d["mean"] for _, d in points], style, color=c, marker="o", markersize=4, label=label(name))
            panel.fill_between(
                x, [d["low"] for _, d in points], [d["high"] for _, d in points], color=c, alpha=0.1, lw=0
            )
        panel.set_xticks(x, [f"{scale:g}" for scale in x])
        text(panel, "scale of the deviation from the mean", "similarity (cosine)", f"recogniser {recogniser}")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return png(figure)


def explained_variance(facts: Mapping[str, Any]) -> bytes:
    """The paper's Figure 3: cumulative share of variance over principal components."""
    curve = np.asarray(facts["explained_variance"]["cumulative"])
    rows = facts["explained_variance"]["rows"]
    figure, (axis,) = canvas(6.4, 3.2)
    x = np.arange(1, len(curve) + 1)
    axis.plot(x, curve, color=SYNTHESISERS[0], linewidth=2)
    axis.plot(x, x / max(1, rows - 1), ":", color=MUTED, linewidth=1)
    axis.annotate("no structure: every person a direction of their own", (0.98, 0.06), xycoords="axes fraction",
                  ha="right", fontsize=7.5, color=MUTED)  # fmt: skip
    for share in (0.5, 0.9):
        reached = np.flatnonzero(curve >= share)
        if len(reached):
            axis.plot([reached[0] + 1] * 2, [0, share], color=MUTED, linewidth=0.8)
            axis.annotate(f"{share:.0%}: {reached[0] + 1}", (reached[0] + 1, share), textcoords="offset points",
                          xytext=(6, -10), fontsize=8, color=INK)  # fmt: skip
    axis.set_xlim(0, len(curve) + 1)
    axis.set_ylim(0, 1.02)
    text(axis, "principal components", "share of variance", f"explained variance of {rows:,} LoRAs (normalised)")
    return png(figure)


def prompts(results: Mapping[str, Any]) -> bytes | None:
    """Whether the scene still obeys, and rank-1, side by side."""
    table, recognisers = results["methods"], results["recognisers"]
    names = [name for name in order(list(table)) if is_main(name)]
    titles = [f"rank-1 among {results['held_out']['people']}, {r}" for r in recognisers]
    values = [[table[name]["by"][r]["rank1"] for name in names] for r in recognisers]
    if all("prompt_accuracy" in table[name] for name in names):
        titles.append("prompt obeyed")
        values.append([table[name]["prompt_accuracy"]["all"] for name in names])
    figure, panels = canvas(9.6, 0.9 + 0.3 * len(names), len(titles), share_y=True)
    for panel, title, dots in zip(panels, titles, values, strict=True):
        for i, (name, dot) in enumerate(zip(names, dots, strict=True)):
            c = colour(name, names)
            panel.barh(i, dot["mean"], height=0.55, color=c, alpha=0.85)
            panel.plot([dot["low"], dot["high"]], [i, i], color=INK, linewidth=1)
        panel.set_xlim(0, 1)
        panel.grid(axis="y", visible=False)
        text(panel, title=title)
    panels[0].set_yticks(range(len(names)), [label(name) for name in names])
    panels[0].invert_yaxis()
    return png(figure)
