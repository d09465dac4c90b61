"""Rounds of chaos.py with whole jobs, each on a Ray of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import whole_job
from evaluation_world import build_corpora, evaluation_settings
from factory_world import make_world
from serve_world import random_synthesizer
from tally import contents

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.lora.layout import LoRALayout

if TYPE_CHECKING:
    from chaos import Chaos

CORPUS = ("ledger", "raylet", "fine-tuning worker", "GCS", "driver", "embedding worker", "agent", whole_job.MEMORY)


def corpus(chaos: Chaos) -> None:
    """The corpus job, of which each part is killed in turn, when one to three shards are there."""
    base, log = chaos.folder / "world", chaos.folder / "ray.log"
    words = ["--config", str(base / "config.yaml")]
    if not base.exists():
        whole_job.prepare(base)
        assert whole_job.run("build_corpus", [*words, f"output={base}/calm"], log)[0] == 0, log.read_text()[-3000:]
    calm = whole_job.outcome(base / "calm")
    output, tally = chaos.new("corpus job"), chaos.tallies["corpus job"]
    part, shards = CORPUS[(tally.rounds - 1) % len(CORPUS)], chaos.random.randint(1, 3)
    words.append(f"output={output}")
    ready = lambda: len(list(output.glob("shards/*.parquet"))) >= shards  # noqa: E731
    code, said, seconds = whole_job.run("build_corpus", words, log, part, ready)
    if code != 99:
        tally.kill(part, seconds, len(contents(str(output))))
        tally.log[-1] |= {"exit_code": code, "said": said}
        expected = {0, 3} if part == whole_job.MEMORY else {whole_job.PARTS[part][1]}
        assert code in expected, log.read_text()[-3000:]
        assert code != 3 or said.endswith("run the same command again"), said
    code, said, _ = whole_job.run("build_corpus", words, log)
    assert code == 0, log.read_text()[-3000:]
    found = whole_job.outcome(output)
    tally.lost += len(set(calm["everybody"]) - set(found["everybody"]))
    tally.doubled += len(found["everybody"]) - len(set(found["everybody"]))
    tally.different += found != calm
    shutil.rmtree(output)


def evaluation(chaos: Chaos) -> None:
    """The evaluation, whose driver or worker is killed one to three times while it embeds, draws and writes."""
    base, log = chaos.folder / "evaluation-world", chaos.folder / "ray.log"
    words = [*evaluation_settings(base), f"synthesizers={{latent: {base}/synthesizer}}"]
    if not base.exists():
        make_world(base)
        build_corpora(base)
        manifest = CorpusReader(base / "corpus").manifest
        layout = LoRALayout.from_dict(manifest.layout)
        random_synthesizer(layout, manifest.base["fingerprint"]).save_pretrained(base / "synthesizer")
        assert whole_job.run("evaluate", [*words, f"output={base}/calm"], log)[0] == 0, log.read_text()[-3000:]
    output, tally, calm = chaos.new("evaluation"), chaos.tallies["evaluation"], results(base / "calm")
    words.append(f"output={output}")
    for _ in range(chaos.random.randint(1, 3)):
        part = chaos.random.choice(["driver", "scoring worker", "embedding worker"])
        count = chaos.random.randint(0, len(calm["scores"]) - 1) if part != "embedding worker" else 0
        ready = lambda count=count: len(list(output.glob("scores/*.safetensors"))) >= count  # noqa: E731
        code, said, seconds = whole_job.run("evaluate", words, log, part, ready)
        if code != 99:
            tally.kill(part, seconds, len(contents(str(output))))
            tally.log[-1] |= {"exit_code": code, "said": said}
            assert code == whole_job.PARTS[part][1], log.read_text()[-3000:]
    there = {path.name: path.stat().st_mtime_ns for path in output.glob("scores/*")}
    code, _, _ = whole_job.run("evaluate", words, log)
    assert code == 0, log.read_text()[-3000:]
    for name, when in there.items():
        assert (output / "scores" / name).stat().st_mtime_ns == when, f"{name} was drawn again"
    found = results(output)
    if differ := [
        f"{key}: {calm.get(key)!r:.500} | {found[key]!r:.500}" for key in found if found[key] != calm.get(key)
    ]:
        print("another evaluation than undisturbed:", *differ, sep="\n", file=sys.stderr, flush=True)
    tally.different += found != calm
    shutil.rmtree(output)


def results(output: Path) -> dict[str, Any]:
    """What an evaluation says, but for when, where and how long."""
    found = json.loads((output / "results.json").read_text())
    kept = {key: value for key, value in found.items() if key not in ("date", "commit", "machine", "config")}
    return {
        **kept,
        "scores": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("scores/*")},
    }
