"""The evaluation from end to end, with the two costly steps given from outside: on Ray by jobs/evaluate.py, or `Here`.

    evaluate(EvaluationConfig(corpus=..., held_out=..., output=...), Here)

Axes: K held-out people, N vector length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lora_diffusion.artifacts.provenance import provenance
from lora_diffusion.config import placed, relative, to_dict
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.evaluation.ablation_results import read_ablations
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.evaluation.held_out import (
    EmbeddedPhotos,
    Floats,
    PhotoEmbedder,
    Setup,
    choose,
    corpus_config,
    gather,
)
from lora_diffusion.evaluation.methods import (
    SYNTHESISED,
    Method,
    check_fit,
    controls_and_baselines,
    synthesised,
    with_scales,
)
from lora_diffusion.evaluation.report import write_report
from lora_diffusion.evaluation.results import tabulate
from lora_diffusion.evaluation.scoring import PersonScores, Request, Scorer, Scores, score_key
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.factory.planning import find, list_people
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis import Synthesizer
from lora_diffusion.synthesis.training.dataset import CorpusRows, open_rows, take_snapshot
from lora_diffusion.training.progress import Progress

FOLDER = "scores"


class Workers(Protocol):
    """Who does the work. Both yield answers in any order, as they come."""

    def embed(self, setup: Setup, people: Sequence[PersonRef]) -> Iterable[tuple[str, EmbeddedPhotos | str]]:
        """Identity, and the person or why they cannot be asked about."""
        ...

    def score(
        self, setup: Setup, layout: LoRALayout, galleries_RKC: Floats, batches: Sequence[Sequence[Request]]
    ) -> Iterable[PersonScores]: ...


class Here:
    """In this process, one after the other."""

    def embed(self, setup: Setup, people: Sequence[PersonRef]) -> Iterator[tuple[str, EmbeddedPhotos | str]]:
        embed = PhotoEmbedder(setup, BaseModel.from_pretrained(setup.made.base).image_size)
        for person in people:
            yield person.identity, embed(person)

    def score(
        self, setup: Setup, layout: LoRALayout, galleries_RKC: Floats, batches: Sequence[Sequence[Request]]
    ) -> Iterator[PersonScores]:
        score = Scorer(setup, layout, galleries_RKC)
        for batch in batches:
            yield from score(batch)


class Evaluation:
    """Corpus, held-out people, and scores that are drawn once and kept.

    Raises ValueError if the two corpora do not fit, or nobody can be asked about.
    """

    def __init__(self, config: EvaluationConfig, workers: Workers) -> None:
        self.config, self.workers = config, workers
        self.corpus, self.held_reader = CorpusReader(config.corpus), CorpusReader(config.held_out)
        self.store = open_store(config.output)
        identities, vectors_KN = choose(self.held_reader, self.corpus, config.limit)
        self.made = placed(corpus_config(self.held_reader, config))
        self.setup = Setup(config, self.made, self.corpus.manifest.identity)
        people = list_people(replace(self.made, limit=None))
        answers = workers.embed(self.setup, [find(people, name) for name in identities])
        self.held = gather(identities, vectors_KN, dict(answers))

    @property
    def recogniser_names(self) -> list[str]:
        second = self.config.second_recogniser
        return [self.made.embedder.model, *([second] if second else [])]

    def rows(self) -> CorpusRows:
        """What was learned from, on this machine's disk."""
        return open_rows(take_snapshot(self.config.corpus), self.config.data)

    def _kept(self, name: str) -> Scores:
        try:
            return Scores.from_bytes(self.store.read(name))
        except ValueError as error:
            way_out = "Delete it: the same command draws these pictures again"
            raise ValueError(f"{self.store.uri}/{name} cannot be read: {error}. {way_out}") from error

    def score(self, methods: Sequence[Method]) -> dict[str, Scores]:
        """Scores by `Method.id`; what is in the store is read, the rest is drawn and written there."""
        keys = {method.id: self._key(method) for method in methods}
        if len(keys) != len(methods):
            raise ValueError(f"two methods of one name: {sorted(method.id for method in methods)}")
        there = self.store.files(FOLDER)
        scores = {
            name: self._kept(f"{FOLDER}/{key}.safetensors")
            for name, key in keys.items()
            if f"{key}.safetensors" in there
        }
        todo = [method for method in methods if method.id not in scores]
        each = len(self.config.render.pictures()[0])
        progress = Progress(sum(method.vectors_KSN[..., 0].size for method in todo) * each, "pictures")
        print(
            f"{len(methods)} sets of LoRAs, {len(scores)} scored before: {progress.total:,} pictures to draw",
            flush=True,
        )
        if not todo:
            return scores
        missing = {method.id: len(method.people_K) for method in todo}
        answers: dict[str, list[PersonScores]] = {method.id: [] for method in todo}
        requests = batches(todo, self.config.batch_people)
        layout, galleries = self.corpus.layout, self.held.galleries_RKC
        for answer in self.workers.score(self.setup, layout, galleries, requests):
            name = answer.method
            answers[name].append(answer)
            progress.add(answer.cosines_RTK.shape[1])
            if len(answers[name]) == missing[name]:
                scores[name] = Scores.of(answers.pop(name))
                self.store.write(f"{FOLDER}/{keys[name]}.safetensors", scores[name].to_bytes())
        if answers:
            raise RuntimeError(f"the workers gave no answer for {sorted(answers)}")
        return scores

    def _key(self, method: Method) -> str:
        fingerprint = self.corpus.manifest.base["fingerprint"]
        return score_key(method, self.config, self.held.key, fingerprint, self.corpus.layout.layout_id)


def evaluate(config: EvaluationConfig, workers: Workers) -> dict[str, Any]:
    """Everything of jobs/evaluate.py; returns what `results.json` holds."""
    ablations = None
    if config.ablations:
        ablations = read_ablations(config.ablations)
    models = {name: Synthesizer.from_pretrained(path) for name, path in config.synthesizers.items()}
    check_fit(models, CorpusReader(config.corpus))
    run = Evaluation(config, workers)
    print(f"{len(run.held)} held-out people; left out: {dict(run.held.left_out) or 'nobody'}", flush=True)
    methods, facts = controls_and_baselines(run.rows(), run.held)
    mean_N = next(method for method in methods if method.name == "mean").vectors_KSN[0, 0]
    facts["synthesizers"] = {}
    for name, model in models.items():
        found, facts["synthesizers"][name] = synthesised(name, model, run.held, config)
        methods += found
    methods = with_scales(methods, config.scales, mean_N)
    scores = run.score(methods)
    reference = f"{SYNTHESISED}:{config.reference or next(iter(models), '')}"
    results = {
        **provenance(),
        "config": relative(to_dict(config)),
        "corpus": describe(run.corpus),
        "held_out": {**describe(run.held_reader), "people": len(run.held), "left_out": dict(run.held.left_out)},
        "recognisers": run.recogniser_names,
        **tabulate(methods, scores, run.held, run.recogniser_names, reference),
        "facts": facts,
    }
    run.store.write_json("results.json", results)
    write_report(run.store, results, run.held, methods, scores, ablations)
    return results


def describe(reader: CorpusReader) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "people": len(reader),
        "recipe_id": manifest.recipe_id,
        "base": dict(manifest.base),
        "recipe": manifest.recipe,
    }


def batches(methods: Sequence[Method], size: int) -> list[list[Request]]:
    """Requests, about `size` LoRAs of one method together.

    Never of two: rounding hangs on who is drawn together, and a method's scores must not hang on which others still lack theirs.
    """
    found: list[list[Request]] = []
    for method in methods:
        people = max(1, size // method.vectors_KSN.shape[1])
        requests = [Request(method.id, int(person), method.vectors_KSN[k]) for k, person in enumerate(method.people_K)]
        found += [requests[first : first + people] for first in range(0, len(requests), people)]
    return found
