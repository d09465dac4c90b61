"""jobs/evaluate.py and jobs/ablate.py from corpora to pages: run twice they draw nothing twice, on Ray they say the same."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_world import ablation_settings, build_corpora, evaluation_settings

from lora_diffusion.config import load_config
from lora_diffusion.evaluation import EvaluationConfig, Scores
from lora_diffusion.evaluation.ablation import AblationConfig
from lora_diffusion.evaluation.ablation_pipeline import TrainHere, ablate
from lora_diffusion.evaluation.pipeline import Here, evaluate
from lora_diffusion.jobs.run import main

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def corpora(world: Path) -> Path:
    build_corpora(world)
    return world


@pytest.fixture(scope="module")
def ablated(corpora: Path) -> Path:
    """An ablation of two networks, whose synthesisers the evaluation then compares."""
    output = corpora / "ablations"
    ablate(
        load_config(AblationConfig, None, [*ablation_settings(corpora), f"evaluation.output={output}"]),
        Here(),
        TrainHere(),
    )
    return output


@pytest.fixture(scope="module")
def config(corpora: Path, ablated: Path) -> EvaluationConfig:
    made = load_config(EvaluationConfig, None, [*evaluation_settings(corpora), f"output={corpora / 'evaluation'}"])
    (reference,) = (ablated / "runs").glob("reference-*")
    return replace(made, synthesizers={"latent": f"{reference}/synthesizer"}, ablations=str(ablated))


@pytest.fixture(scope="module")
def evaluated(config: EvaluationConfig) -> Path:
    evaluate(config, Here())
    return Path(config.output)


def test_results_hold_every_method_and_say_where_they_come_from(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    assert set(results["methods"]) == {
        *("base", "other", "mean", "nearest", "ridge_vector", "ridge_pca", "finetuned"),
        *("synthesised:latent", "reconstructed:latent"),
    }
    assert results["held_out"]["people"] == 2
    assert results["commit"]
    assert results["machine"]
    assert results["config"]["render"]["num_inference_steps"] == 2
    facts = results["facts"]["synthesizers"]["latent"]
    assert facts["reconstruction"]["rows"] == 2
    assert len(results["facts"]["explained_variance"]["cumulative"]) >= 2
    for name in ("report.html", "contact_sheet.png", "similarity.png", "conditioning.png"):
        assert (evaluated / name).stat().st_size > 1000, name


def test_what_was_drawn_is_not_drawn_again(
    config: EvaluationConfig, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluated / "results.json").read_bytes()
    again = evaluate(config, Here())
    assert ": 0 pictures to draw" in capsys.readouterr().out
    assert json.loads(before)["methods"] == json.loads(json.dumps(again["methods"]))


def test_no_embedding_is_kept(evaluated: Path) -> None:
    """Scores hold cosines of renders with the held-out people, nothing that a face could be found by."""
    from safetensors.numpy import load_file

    for path in (evaluated / "scores").iterdir():
        for name, value in load_file(path).items():
            assert 512 not in value.shape, (path.name, name)


def test_a_finished_ablation_trains_and_draws_nothing(
    corpora: Path, ablated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ablated / "ablations.jsonl").read_bytes()
    runs = {path: path.stat().st_mtime_ns for path in ablated.glob("runs/*/run.json")}
    config = load_config(AblationConfig, None, [*ablation_settings(corpora), f"evaluation.output={ablated}"])
    ablate(config, Here(), TrainHere())
    assert (ablated / "ablations.jsonl").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert ": 0 pictures to draw" in capsys.readouterr().out
    records = [json.loads(line) for line in before.decode().splitlines()]
    assert {r["variant"]["conditioning"] for r in records if r["variant"]} == {"adanorm", "adalora"}
    assert all(record["curve"] for record in records if record["variant"])


def test_people_who_were_learned_from_cannot_be_asked_about(config: EvaluationConfig) -> None:
    with pytest.raises(ValueError, match="held-out people are in the corpus too"):
        evaluate(replace(config, held_out=config.corpus), Here())


def test_a_missing_corpus_and_missing_ablations_are_told_with_the_way_out(config: EvaluationConfig) -> None:
    with pytest.raises(ValueError, match=r"no corpus at /nowhere: .*jobs/build_corpus.py"):
        evaluate(replace(config, held_out="/nowhere"), Here())
    with pytest.raises(ValueError, match=r"no ablations at /nowhere: make them with jobs/ablate.py"):
        evaluate(replace(config, ablations="/nowhere"), Here())


@pytest.mark.ray
def test_on_ray_the_scores_are_those_of_one_process(
    ray_local: None,
    corpora: Path,
    config: EvaluationConfig,
    evaluated: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*evaluation_settings(corpora), f"synthesizers.latent={config.synthesizers['latent']}"]
    output = corpora / "on_ray"
    assert main("evaluate", ["--config", str(corpora / "empty.yaml"), *words, f"output={output}"]) == 1  # no such file
    (corpora / "empty.yaml").write_text("")
    assert main("evaluate", ["--config", str(corpora / "empty.yaml"), *words, f"output={output}", "worker_gpus=1"]) == 1
    assert "and 1 GPU (worker_cpus and worker_gpus); this Ray has 8 CPUs and 0 GPUs" in capsys.readouterr().err
    assert not output.exists()
    assert main("evaluate", ["--config", str(corpora / "empty.yaml"), *words, f"output={output}"]) == 0
    here, there = (
        {file.name: Scores.from_bytes(file.read_bytes()) for file in (path / "scores").iterdir()}
        for path in (evaluated, output)
    )
    assert there.keys() == here.keys()  # a name is made of vectors, people and photos
    shown = []
    for name, scores in here.items():
        np.testing.assert_allclose(there[name].cosines_KRTJ, scores.cosines_KRTJ, atol=1e-3)
        # one level of 255 is rounding: batches are put together otherwise
        np.testing.assert_allclose(there[name].pictures_KPHWC.astype(int), scores.pictures_KPHWC.astype(int), atol=1)
        shown.append(scores.pictures_KPHWC[0].astype(int))
    assert max(np.abs(a - shown[0]).max() for a in shown[1:]) > 1  # the LoRAs do show


@pytest.mark.ray
def test_the_ablation_job_trains_in_tasks(ray_local: None, corpora: Path) -> None:
    (corpora / "empty.yaml").write_text("")
    output = corpora / "ablations_on_ray"
    words = ["--config", str(corpora / "empty.yaml"), *ablation_settings(corpora), f"evaluation.output={output}"]
    assert main("ablate", words) == 0
    assert len(list(output.glob("runs/*/run.json"))) == 2
    assert (output / "ablations.html").exists()


@pytest.mark.parametrize("name", ["evaluate.py", "ablate.py"])
def test_jobs_can_be_submitted_as_they_are(name: str) -> None:
    assert os.access(JOBS / name, os.X_OK)
    assert (JOBS / name).read_text().startswith("#!/usr/bin/env python\n")
