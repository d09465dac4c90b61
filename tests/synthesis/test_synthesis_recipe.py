"""Laws of the way from a corpus to a synthesiser, without Ray: resumable anywhere, complete, refusing what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from low_rank_corpus import LAYOUT, write_corpus

from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.corpus.forget import forget
from lora_diffusion.corpus.tombstone import keyed_hash, make_key
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.denoiser import DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig
from lora_diffusion.synthesis.publish import publish
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.begin import begin, describe, snapshot_of
from lora_diffusion.synthesis.training.dataset import open_rows
from lora_diffusion.synthesis.training.metrics import losses, read_metrics
from lora_diffusion.synthesis.training.recipe import SynthesizerTraining
from lora_diffusion.synthesis.training.stages import DenoiserStage
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.checkpoint import unpack
from lora_diffusion.verify import examine, repair

LOOP = {"steps": 12, "batch_size": 8, "warmup": 2, "validate_every": 4, "log_every": 3, "checkpoint_every": 5}
SMALL = {
    "vae": {"latent_size": 6, "hidden": [12]},
    "pca": {"num_components": 6},
    "denoiser": {"width": 16, "depth": 1, "condition_width": 16, "generator_width": 4, "rank": 2},
    "vae_training": LOOP,
    "denoiser_training": LOOP,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("corpus"))
    make_key(open_store(place))
    write_corpus(open_store(place), 40, bad={5: "nan", 9: "failed"})
    return place


def config_of(corpus: str, output: Path, **values: Any) -> TrainConfig:
    given = {"corpus": corpus, "output": str(output), "data": {"cache": str(output.parent / "cache")}}
    return from_dict(TrainConfig, {**SMALL, **given, **values})


def train(config: TrainConfig, report: Callable[[dict[str, Any]], None] = lambda values: None) -> list[str]:
    """All of jobs/train.py but Ray; returns what was said."""
    snapshot, said = begin(config), []
    rows = open_rows(snapshot, config.data)
    SynthesizerTraining(config, snapshot, rows, open_store(config.output), say=said.append, report=report).run()
    return said


@pytest.fixture(scope="module")
def calm(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, list[str]]:
    config = config_of(corpus, tmp_path_factory.mktemp("calm") / "run")
    return config, train(config)


def test_a_corpus_becomes_a_synthesiser(calm: tuple[TrainConfig, list[str]], corpus: str) -> None:
    config, said = calm
    folder = Path(config.output)
    synthesizer = Synthesizer.from_pretrained(folder / "synthesizer")
    vectors = synthesizer.from_embedding(CorpusReader(corpus).embeddings()[:3], num_samples=2)
    assert vectors.shape == (6, LAYOUT.size)
    assert (vectors[:, :20] == np.float32(0.25)).all(), "a column that never varies comes out as it is"
    provenance = synthesizer.provenance
    validations = [line for line in read_metrics(open_store(folder)) if "validation_rank" in line]
    best = min(validations, key=lambda line: (line["validation_rank"], line["validation_loss"]))
    if provenance.figures["denoiser_best_step"]:  # else: before the first step, which no line is about
        assert provenance.figures["denoiser_best_step"] == best["step"]
        assert provenance.figures["denoiser_validation_rank"] == best["validation_rank"]
    assert provenance.corpus["left_out"] == {"nan_vector": 1}
    assert provenance.corpus["failed"] == 1
    assert provenance.corpus["rows"] + provenance.corpus["validation_rows"] == 38
    assert 0 < provenance.figures["reconstruction"]["r2"] <= 1
    assert len(synthesizer.neighbours.codes_PZ) == provenance.corpus["rows"]
    names, found = CorpusReader(corpus).identities, synthesizer.nearest(CorpusReader(corpus).embeddings())
    near = next(place for place, cosine in enumerate(found[1]) if cosine > 0.999)
    expected = keyed_hash(make_key(open_store(corpus)), names[near])
    assert bytes(synthesizer.neighbours.hashes_PH[found[0][near]].tolist()) == expected
    curve = json.loads((folder / "explained_variance.json").read_text())
    assert curve["cumulative"] == sorted(curve["cumulative"])
    assert curve["cumulative"][3] > 0.9, "the corpus has rank 4 and some noise"
    for name in ("explained_variance.png", "plots/vae.png", "plots/denoiser.png", "plots/denoiser_rank.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard" / "vae").glob("events*"))
    assert any(line.startswith("denoiser 12/12  loss") and "left" in line for line in said)
    lines = read_metrics(open_store(folder))
    assert [line["stage"] for line in lines] == sorted((line["stage"] for line in lines), reverse=True)
    assert all(line["validation_loss"] > 0 for line in lines if line["step"] % 4 == 0)


def test_the_same_call_again_does_nothing(calm: tuple[TrainConfig, list[str]]) -> None:
    config, _ = calm
    before = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    train(config)
    assert {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("stage", "step"), [("vae", 6), ("denoiser", 12)])
def test_interrupted_anywhere_it_comes_to_the_same_losses(
    calm: tuple[TrainConfig, list[str]], tmp_path: Path, stage: str, step: int
) -> None:
    calm_config, _ = calm

    class Killed(Exception):
        pass

    def die(values: dict[str, Any]) -> None:
        if (values["stage"], values["step"]) == (stage, step):
            raise Killed

    config = replace(calm_config, output=str(tmp_path / "run"))
    with pytest.raises(Killed):
        train(config, die)
    train(config)
    store, expected = open_store(config.output), open_store(calm_config.output)
    assert losses(read_metrics(store)) == losses(read_metrics(expected))
    for name in ("codes", "denoiser"):
        assert store.read(f"synthesizer/{name}.safetensors") == expected.read(f"synthesizer/{name}.safetensors")


@pytest.mark.parametrize("space", ["pca", "vector"])
def test_the_denoiser_works_in_every_code_space(corpus: str, tmp_path: Path, space: str) -> None:
    values = {"code_space": space, "diffusion": {"prior": "corpus" if space == "pca" else "gaussian"}}
    config = config_of(corpus, tmp_path / "run", **values, tensorboard=False)
    train(config)
    assert not (tmp_path / "run" / "checkpoints" / "vae.safetensors").exists()
    synthesizer = Synthesizer.from_pretrained(tmp_path / "run" / "synthesizer")
    assert synthesizer.from_embedding(np.ones(512)).shape == (1, LAYOUT.size)


def test_each_photo_is_a_condition_of_its_own(corpus: str, tmp_path: Path) -> None:
    denoiser = {**SMALL["denoiser"], "linear_guess": True}
    config = config_of(corpus, tmp_path / "run", code_space="pca", condition="photo", denoiser=denoiser)
    rows = open_rows(begin(config), config.data)
    train(config)

    saved = unpack(open_store(config.output), "linear_guess.safetensors")
    assert saved is not None
    table = CorpusReader(corpus).table(["identity", "photo_embeddings"]).to_pylist()
    names = {rows.identities[slot] for slot in rows.train}
    photos = [photo for row in table if row["identity"] in names for photo in row["photo_embeddings"]]
    assert len(photos) > 2 * len(names)
    np.testing.assert_allclose(saved[0]["mean_C"], np.mean(photos, 0), atol=1e-6)

    with pytest.raises(
        ValueError, match=r"linear_guess\.safetensors was made .*: condition: 'photo' there, 'mean' now"
    ):
        train(replace(config, condition="mean"))

    space = torch.zeros(len(rows.identities), 3)
    model = Diffusion(DiffusionConfig()).denoiser(3, 512, DenoiserConfig(width=8, depth=1, condition_width=8))
    stage = DenoiserStage(model, Diffusion(DiffusionConfig()), rows, lambda slots: space[slots], "photo").eval()
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    slots = rows.validation
    photos_BFC, counts_B = rows.photo_embeddings(slots)
    draws = stage.draws(len(slots), torch.Generator().manual_seed(0))
    for place, expected_B in ((0.0, torch.zeros_like(counts_B)), (0.999, counts_B - 1)):
        stage(stage.inputs(slots), {**draws, "photo": torch.full((len(slots),), place)}, 0)
        assert torch.equal(seen[-1], photos_BFC[torch.arange(len(slots)), expected_B])


def test_who_was_forgotten_meanwhile_is_no_neighbour(tmp_path: Path) -> None:
    make_key(open_store(tmp_path / "corpus"))
    write_corpus(open_store(tmp_path / "corpus"), 16)
    config = config_of(str(tmp_path / "corpus"), tmp_path / "run")
    snapshot = begin(config)
    rows = open_rows(snapshot, config.data)
    training = SynthesizerTraining(
        config, snapshot, rows, open_store(config.output), say=print, report=lambda values: None
    )
    forget(open_store(tmp_path / "corpus"), rows.identities[rows.train[1]])
    codes = lambda slots: torch.zeros(len(slots), 6)  # noqa: E731
    neighbours = training._neighbours(codes)
    assert len(neighbours.embeddings_PC) == len(neighbours.codes_PZ) == len(neighbours.hashes_PH) == len(rows.train) - 1
    gone = rows.embeddings(rows.train[1:2])[0]
    assert (neighbours.embeddings_PC @ gone).max() < 0.999


def test_a_folder_that_two_have_written_is_refused(calm: tuple[TrainConfig, list[str]], tmp_path: Path) -> None:
    """A publish over an older folder that was killed left the new codes beside the old denoiser."""
    source = Path(calm[0].output) / "synthesizer"
    shutil.copytree(source, tmp_path / "folder")
    Synthesizer.from_pretrained(source).save_pretrained(tmp_path / "other", torch.float16)
    shutil.copy(tmp_path / "other" / "codes.safetensors", tmp_path / "folder" / "codes.safetensors")
    with pytest.raises(ValueError, match=r"codes.safetensors is another synthesiser's"):
        Synthesizer.from_pretrained(tmp_path / "folder")


def test_a_denoiser_may_keep_the_newest_weights(corpus: str, tmp_path: Path) -> None:
    """It ended in a ValueError after the last step, whenever it was tried."""
    config = config_of(corpus, tmp_path / "run", code_space="pca", denoiser_training={**LOOP, "keep": "newest"})
    train(config)
    figures = Synthesizer.from_pretrained(tmp_path / "run" / "synthesizer").provenance.figures
    (last,) = [
        line for line in read_metrics(open_store(tmp_path / "run")) if line["step"] == 12 and "validation_rank" in line
    ]
    assert figures["denoiser_best_step"] == 12
    assert figures["denoiser_validation_loss"] == last["validation_loss"]


def test_statistics_of_other_rows_are_refused(calm: tuple[TrainConfig, list[str]], tmp_path: Path) -> None:
    """After a kill, or a stage that was deleted as our message says: they were used for rows that they had not seen."""
    config, _ = calm
    shutil.copytree(config.output, tmp_path / "run")
    for path in [*(tmp_path / "run").glob("checkpoints/*"), *(tmp_path / "run").glob("*.safetensors")]:
        if path.name != "statistics.safetensors":
            path.unlink()
    changed = replace(config, output=str(tmp_path / "run"), data=replace(config.data, validation_fraction=0.3))
    with pytest.raises(
        ValueError, match=r"statistics.safetensors was made of other rows: validation_fraction: 0.1 there"
    ):
        train(changed)
    statistics = tmp_path / "run" / "statistics.safetensors"
    statistics.write_bytes(Statistics.from_bytes(statistics.read_bytes()).to_bytes())  # as earlier releases wrote them
    with pytest.raises(ValueError, match=r"was made of other rows: \d+ instead of \d+"):
        train(changed)
    train(replace(changed, data=config.data))


def test_stages_one_by_one_equal_all_at_once(calm: tuple[TrainConfig, list[str]], tmp_path: Path) -> None:
    config = replace(calm[0], output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"no pca\.safetensors in .*: run stage=pca first"):
        train(replace(config, stage="vae"))
    train(replace(config, stage="pca"))
    with pytest.raises(ValueError, match=r"the VAE in .* is not trained: run stage=vae"):
        train(replace(config, stage="denoiser"))
    for stage in ("vae", "denoiser"):
        train(replace(config, stage=stage))
    expected = open_store(calm[0].output)
    assert losses(read_metrics(open_store(config.output))) == losses(read_metrics(expected))


def test_what_does_not_fit_is_refused_and_nothing_is_overwritten(
    calm: tuple[TrainConfig, list[str]], corpus: str, tmp_path: Path
) -> None:
    config, _ = calm
    before = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    other = LAYOUT.from_shapes({"a.to_q": (20, 16)}, rank=1, alpha=1.0, target_modules=("to_q",))
    write_corpus(open_store(tmp_path / "other"), 16, layout=other)
    for changed, message in (
        (
            replace(config, layout_id="0123456789abcdef"),
            f"has layout_id {LAYOUT.layout_id}, the configuration asks for",
        ),
        (replace(config, corpus=str(tmp_path / "other")), "was begun with the corpus at .* choose another output"),
        (replace(config, vae=replace(config.vae, kl_weight=0.1)), "vae.kl_weight: 0.5 there, 0.1 now"),
        (replace(config, condition="photo"), "condition: 'mean' there, 'photo' now"),
        (replace(config, data=replace(config.data, max_people=9)), "max_people"),
        (replace(config, workers=replace(config.workers, max_workers=9)), "batch_size is 8, for up to 9 workers"),
        (replace(config, corpus=str(tmp_path / "nowhere"), output=str(tmp_path / "new")), "no corpus at"),
    ):
        with pytest.raises(ValueError, match=message):
            train(changed)
    after = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    assert {name: data for name, data in after.items() if name.name != "config.yaml"} == {
        name: data for name, data in before.items() if name.name != "config.yaml"
    }
    assert not (tmp_path / "new").exists()


def test_published_it_draws_as_told_and_knows_the_attributes(
    calm: tuple[TrainConfig, list[str]], corpus: str, tmp_path: Path
) -> None:
    source, out, labels = f"{calm[0].output}/synthesizer", str(tmp_path / "out"), str(tmp_path / "labels.parquet")
    names = CorpusReader(corpus).identities
    first = CorpusReader(corpus).embeddings()[:, 0].tolist()
    pq.write_table(pa.table({"identity": names, "first": first, "unknown": [None, *first[:0:-1]]}), labels)
    publish(source, out, {})
    assert Path(out, "neighbours.safetensors").exists()
    publish(source, out, {"guidance_scale": "2"}, corpus=corpus, labels=labels, neighbours=False)
    assert not Path(out, "neighbours.safetensors").exists(), "everybody's embeddings would go out with the folder"
    before, after = Synthesizer.from_pretrained(source), Synthesizer.from_pretrained(out)
    assert after.latent_sampling == replace(before.latent_sampling, guidance_scale=2.0)
    assert after.neighbours is None
    assert after.directions is not None
    assert after.directions.names == ("first", "unknown")
    face = CorpusReader(corpus).embeddings()[:1]
    expected = before.from_embedding(face, guidance_scale=2.0)
    np.testing.assert_allclose(after.from_embedding(face), expected, atol=0.01 * np.abs(expected).max())

    with pytest.raises(ValueError, match="no setting 'guidence'; there are guidance_scale"):
        publish(source, out, {"guidence": "2"})
    with pytest.raises(ValueError, match="belong together"):
        publish(source, out, {}, labels=labels)
    pq.write_table(pa.table({"identity": ["nobody"], "first": [1.0]}), labels)
    with pytest.raises(ValueError, match=r"nobody of .* is in"):
        publish(source, out, {}, corpus=corpus, labels=labels)


def test_a_dry_run_says_what_would_be_done(corpus: str, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path / "run", data={"max_people": 20})
    text = describe(config, snapshot_of(config))
    assert "39 people with a LoRA in 5 shards" in text
    assert "1 failed" in text
    assert f"layout: {LAYOUT.layout_id}, N = 76 parameters" in text
    assert "about 18 for training, 2 for validation" in text
    assert "12 steps of 8" in text
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_named_repaired_and_made_whole_by_the_same_command(
    calm: tuple[TrainConfig, list[str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(calm[0].output, tmp_path / "run"))
    assert list(examine(str(run))) == []
    names = [
        "statistics.safetensors",
        "pca.safetensors",
        "checkpoints/vae-best.safetensors",
        "synthesizer/codes.safetensors",
    ]
    for name in names:
        whole = bytearray((run / name).read_bytes())
        whole[len(whole) // 2] ^= 1
        (run / name).write_bytes(whole)
    found = list(examine(str(run)))
    assert [(finding.kind, finding.name) for finding in found] == [("damaged", name) for name in names]
    assert set(repair(str(run), found)) == {*names, "checkpoints/vae.safetensors"}
    train(replace(calm[0], output=str(run)))
    assert list(examine(str(run))) == []
    snapshot = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**snapshot, "recipe_id": "0" * 16}))
    assert {(finding.kind, finding.name) for finding in examine(str(run))} == {("damaged", "data.json")}
