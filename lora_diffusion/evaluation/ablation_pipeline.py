"""The ablations from end to end: train what is missing, draw what is not drawn, compare. On Ray by jobs/ablate.py, or `Here`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lora_diffusion.artifacts.provenance import provenance
from lora_diffusion.config import relative, to_dict
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.evaluation.ablation import (
    AblationConfig,
    Variant,
    distinct_parts,
    plan,
    train_parts,
    train_run,
    variant_rows,
)
from lora_diffusion.evaluation.ablation_figures import draw, sections
from lora_diffusion.evaluation.ablation_results import ABLATIONS, Record, compared, control_records, run_method, scored
from lora_diffusion.evaluation.methods import controls_and_baselines, with_scales
from lora_diffusion.evaluation.page import embedded, page
from lora_diffusion.evaluation.pipeline import Evaluation, Workers
from lora_diffusion.storage import Store
from lora_diffusion.synthesis.training.dataset import take_snapshot

CONTROLS = ("base", "nearest", "ridge_pca", "finetuned")


class Trainers(Protocol):
    """Who trains. Answers may come in any order."""

    def parts(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterable[str]: ...

    def runs(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterable[Record]: ...


class TrainHere:
    """In this process, one after the other."""

    def parts(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterator[str]:
        return (train_parts(config, variant) for variant in variants)

    def runs(self, config: AblationConfig, variants: Sequence[Variant]) -> Iterator[Record]:
        return (train_run(config, variant) for variant in variants)


def ablate(config: AblationConfig, workers: Workers, trainers: Trainers) -> dict[str, Any]:
    """Everything of jobs/ablate.py; returns what `ablations.json` holds.

    Raises ValueError if a corpus is not of the held-out people's layout and base model.
    """
    check(config)
    available = take_snapshot(config.evaluation.corpus).num_rows
    variants = plan(config, available)
    shared = distinct_parts(variants)
    print(f"{len(variants)} runs of {len(shared)} sets of rows -> {config.output}", flush=True)
    for i, name in enumerate(trainers.parts(config, shared)):
        print(f"{i + 1}/{len(shared)} {name}", flush=True)
    records = []
    for record in trainers.runs(config, variants):
        records.append(record)
        loss = record["figures"]["denoiser_validation_loss"]
        print(f"{len(records)}/{len(variants)} {record['name']}: validation loss {loss:.4f}", flush=True)
    return judge(config, workers, records, available)


def judge(config: AblationConfig, workers: Workers, records: Sequence[Record], available: int) -> dict[str, Any]:
    """Draw and score the LoRAs of all runs, and write ablations.jsonl, ablations.json, figures and ablations.html."""
    run = Evaluation(config.evaluation, workers)
    baselines, _ = controls_and_baselines(variant_rows(config, config.reference)[1], run.held)
    mean_N = next(method for method in baselines if method.name == "mean").vectors_KSN[0, 0]
    controls = with_scales([m for m in baselines if m.name in CONTROLS], config.evaluation.scales, mean_N)
    # a run of another corpus deviates from that corpus' mean
    made = []
    for record in records:
        method, mean = run_method(config, record, run.held)
        made += with_scales([method], config.evaluation.scales, mean)
    scores = run.score([*controls, *made])
    names = run.recogniser_names
    done = [*control_records(controls, scores, names), *(scored(record, made, scores, names) for record in records)]
    rows = compared(config, done, available)
    results = {
        **provenance(),
        "config": relative(to_dict(config)),
        "people": len(run.held),
        "recognisers": names,
        "table": rows,
    }
    run.store.write(ABLATIONS, "".join(json.dumps(record, sort_keys=True) + "\n" for record in done).encode())
    run.store.write_json("ablations.json", results)
    write_page(run.store, results, done)
    return results


def write_page(store: Store, results: Mapping[str, Any], records: Sequence[Record]) -> None:
    pictures = draw(results, records)
    for name, data in pictures.items():
        store.write(f"{name}.png", data)
    subtitle = f"{results['people']} held-out people · {results['date']} · commit {results['commit'] or 'unknown'} · {results['machine']}"
    parts = sections(results, embedded(pictures))
    store.write("ablations.html", page("What matters in the synthesiser", subtitle, parts).encode())


def check(config: AblationConfig) -> None:
    unknown = {config.reference.corpus} - {"main", *config.corpora}
    if unknown:
        raise ValueError(
            f"reference.corpus is {config.reference.corpus!r}; corpora are main, {', '.join(config.corpora)}"
        )
    main = CorpusReader(config.evaluation.corpus).manifest.identity
    for name, uri in config.corpora.items():
        other, names = (
            CorpusReader(uri).manifest.identity,
            (f"the corpus at {config.evaluation.corpus}", f"corpus {name!r}"),
        )
        way_out = "Build it with the same, then both can be drawn together"
        main.check(other, *names, way_out, ("base", "recogniser", "layout_id"))  # the start may be what is compared
