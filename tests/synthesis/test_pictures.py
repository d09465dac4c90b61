"""Laws of the stage `pictures`: it begins as the synthesiser before it, resumes to the same losses, and leaves no photo behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthesis_world import SMALL, space_of, toy, untrained

from lora_diffusion.config import from_dict, to_dict
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.codes import LearnedCodes, PCACodes, build_codes
from lora_diffusion.synthesis.denoiser import widened
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.begin import begin, describe
from lora_diffusion.synthesis.training.metrics import losses, read_metrics
from lora_diffusion.synthesis.training.pictures.people import PhotoCache
from lora_diffusion.synthesis.training.pictures.recipe import PictureTraining
from lora_diffusion.synthesis.training.pictures.stage import PictureStage
from lora_diffusion.synthesis.training.train_config import TrainConfig

LOOP = {"steps": 3, "batch_size": 2, "warmup": 1, "validate_every": 2, "log_every": 1, "checkpoint_every": 1}
SCORE = {
    "prompts": ["a photo of sks person, smiling, facing the camera"],
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
}
WEIGHTS = {"denoising": 0.1, "high_noise": 0.2, "outside": 0.1, "code_length": 0.01, "sharpness": 0.1}


def config_of(world: Path, output: Path, **pictures: Any) -> TrainConfig:
    start = Synthesizer.from_pretrained("tiny")
    values = {
        "output": str(output),
        "stage": "pictures",
        "tensorboard": False,
        "data": {"cache": str(output.parent / "cache")},
        "denoiser": to_dict(start.denoiser.config),
        "pictures_training": {**LOOP, "learning_rate": 1e-3, "weight_decay": 0.0},
        "pictures": {
            "people": str(world / "people"),
            "start": "tiny",
            "validation_people": 2,
            "new_components": 3,
            "num_inference_steps": 2,
            "pictures_each": 1,
            "denoising_photos": 1,
            "second_recogniser": "tiny-b",
            "prompt_scorer": "lora_diffusion.world.scenes:Scenes",
            "weights": WEIGHTS,
            "score": SCORE,
            **pictures,
        },
    }
    return from_dict(TrainConfig, values)


def train(config: TrainConfig, report: Any = lambda values: None) -> list[str]:
    said: list[str] = []
    assert begin(config) is None
    PictureTraining(config, open_store(config.output), say=said.append, report=report).run()
    return said


@pytest.fixture(scope="module")
def calm(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, list[str]]:
    config = config_of(world, tmp_path_factory.mktemp("pictures") / "run")
    return config, train(config)


@pytest.mark.slow
def test_without_any_corpus_pictures_make_a_synthesiser(calm: tuple[TrainConfig, list[str]]) -> None:
    config, said = calm
    made, start = (Synthesizer.from_pretrained(place) for place in (f"{config.output}/synthesizer", "tiny"))
    assert made.code_size == start.code_size + 3
    face = np.random.default_rng(0).normal(size=512)
    before, after = start.from_embedding(face), made.from_embedding(face)
    assert after.shape == before.shape
    best = made.provenance.figures["pictures_best_step"]
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-4 or best == 0
    lines = read_metrics(open_store(config.output))
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"identity", "denoising", "high_noise", "outside", "faces", "left_out", "validation_score"} <= {*lines[-1]}
    assert {"validation_likeness", "validation_second", "validation_prompt_pose", "validation_detail"} <= {*lines[-1]}
    assert (Path(config.output) / "plots" / "pictures_drawn.png").read_bytes().startswith(b"\x89PNG")
    assert not list((Path(config.output).parent / "cache").glob("pictures-*")), "no photo's data stays behind"
    assert made.neighbours is not None
    assert made.neighbours.codes_PZ.shape[1] == made.code_size
    assert any("photos: 16 of 8 people" in line for line in said)
    assert "pictures: people of" in describe(config, None)


@pytest.mark.slow
def test_interrupted_it_comes_to_the_same_losses(calm: tuple[TrainConfig, list[str]], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die(values: dict[str, Any]) -> None:
        if values["step"] == 2:
            raise Killed

    config = replace(calm[0], output=str(tmp_path / "run"))
    with pytest.raises(Killed):
        train(config, die)
    assert not list((Path(calm[0].output).parent / "cache").glob("pictures-*"))
    train(config)
    found, expected = (losses(read_metrics(open_store(c.output))) for c in (config, calm[0]))
    assert found == expected
    with pytest.raises(ValueError, match=r"weights.denoising: 0.1 there, 0.3 now"):
        train(
            replace(config, pictures=replace(config.pictures, weights=replace(config.pictures.weights, denoising=0.3)))
        )


def test_who_has_one_photo_is_taught_by_its_mirror_image_and_who_has_none_is_counted(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "people").mkdir()
    for place, person in enumerate(sorted((world / "people").glob("person-*"))[:5]):
        target = tmp_path / "people" / person.name
        target.mkdir()
        for photo in sorted(person.glob("*.jpg"))[: 1 if place else 2]:
            (target / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "people" / "nobody").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "people" / "nobody" / "0.jpg")
    config = config_of(world, tmp_path / "run", people=str(tmp_path / "people")).pictures
    cache, said = PhotoCache(config, "tiny", BaseModel.from_pretrained("tiny-sd"), str(tmp_path / "cache")), []
    cache.fill(said.append)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert said == ["photos: 10 of 5 people; left out: 1 × no_face, 1 × too_few_photos"]
    people = cache.open()
    assert sorted([*people.train, *people.validation]) == list(range(5))
    shown_BE, others_BRE = people.faces(np.array([1]), np.array([0]))
    assert 0.9 < float(shown_BE[0] @ others_BRE[0, 0]) < 0.99999, "the mirror image is nearly the same face"
    with pytest.raises(
        ValueError, match=r"5 of 6 people .* have a usable photo .*no_face.*lower pictures.validation_people"
    ):
        PhotoCache(replace(config, validation_people=4), "tiny", cache.base, str(tmp_path / "other")).fill()
    others = [PhotoCache(replace(config, validation_people=3), "tiny", cache.base, tmp_path / "cache")]
    others += [PhotoCache(config, "tiny", cache.base, tmp_path / "cache", output) for output in ("one", "two")]
    assert len({cache.folder, *(other.folder for other in others)}) == 4


@pytest.mark.slow
def test_a_step_reaches_all_that_makes_vectors_and_pictures_without_a_face_count_nowhere(
    world: Path, tmp_path: Path
) -> None:
    config = config_of(world, tmp_path / "run")
    training = PictureTraining(config, open_store(config.output))
    base = BaseModel.from_pretrained("tiny-sd")
    cache = PhotoCache(config.pictures, "tiny", base, str(tmp_path / "cache"))
    cache.fill()
    stage = PictureStage(
        training._grown(Synthesizer.from_pretrained("tiny")), base, cache.open(), config.pictures, "tiny"
    )
    slots = stage.train_slots[:2]
    draws = stage.draws(2, torch.Generator().manual_seed(0))
    loss_B, _ = stage(stage.inputs(slots), draws, 0)
    loss_B.sum().backward()
    moved = {name for name, p in stage.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"codes.components_KM", "denoiser.guess.weight_CZ", "denoiser.last.linear.weight"} <= moved
    people, shown_B = stage.people, np.array([1, 0])
    means_BE = people.faces(slots, shown_B)[1][:, 0]
    numbers_BG, targets_BGE = stage._scenes_and_targets(draws["prompt"], slots, shown_B, means_BE)
    assert torch.equal(targets_BGE[:, 0], means_BE)
    stage.config = replace(config.pictures, matched=1.0)
    numbers_BG, targets_BGE = stage._scenes_and_targets(draws["prompt"], slots, shown_B, means_BE)
    for slot, shown, numbers_G, targets_GE in zip(slots, shown_B, numbers_BG, targets_BGE, strict=True):
        theirs = [people.starts_P[slot] + photo for photo in range(people.counts_P[slot]) if photo != shown]
        at = [place for place in theirs if people.prompt_T[place] == numbers_G[0]]
        faces = torch.from_numpy(people.embeddings_TRE[at, 0])
        assert float((faces @ targets_GE[0]).max()) == pytest.approx(1, abs=1e-5), (
            "the face of the photo with these words"
        )
    assert not any("unet" in name or "network" in name for name, _ in stage.named_parameters())
    stage.teacher.embedder.locate = lambda picture: None  # type: ignore[method-assign]
    loss_B, parts = stage(stage.inputs(slots), draws, 0)
    assert parts["faces"].tolist() == [0, 0]
    assert parts["identity"].tolist() == [0, 0]
    assert torch.isfinite(loss_B).all()


def test_a_grown_synthesiser_answers_as_before() -> None:
    for conditioning in ("adalora", "adanorm"):
        start = untrained("pca", config=replace(SMALL, conditioning=conditioning, linear_guess=True))
        assert isinstance(start.codes, PCACodes)
        space = LearnedCodes.of(start.codes, 4)
        wide = widened(start.denoiser, start.diffusion.denoiser(space.size, 512, start.denoiser.config))
        grown = Synthesizer(start.layout, space, wide, start.diffusion)
        face = np.random.default_rng(0).normal(size=(3, 512))
        how = {"temperature": 0.0, "guidance_scale": 2.0, "num_inference_steps": 2, "deviation_scale": 1.5}
        before, after = start.from_embedding(face, **how), grown.from_embedding(face, **how)
        # the new code numbers begin with a variance of their own, so they are not exactly 0
        assert np.abs(after - before).max() < 1e-3 * np.abs(before).max()
    fresh = start.diffusion.denoiser(space.size, 512, replace(start.denoiser.config, width=16))
    with pytest.raises(ValueError, match="set `denoiser` as it was"):
        widened(start.denoiser, fresh)


def test_new_components_that_would_be_noise_are_refused(tmp_path: Path) -> None:
    """A denoiser that predicts v answers 0 for a new number, which keeps nine tenths of the noise."""
    start = untrained("pca", config=SMALL)
    config = from_dict(
        TrainConfig, {"output": str(tmp_path), "pictures": {"people": "x", "start": "y"}, "denoiser": to_dict(SMALL)}
    )
    training = PictureTraining(config, open_store(tmp_path))
    for sampling, kind, refused in (
        (0.25, "v_prediction", True),
        (0.0, "v_prediction", False),
        (0.25, "sample", False),
    ):
        start.latent_sampling = replace(start.latent_sampling, temperature=sampling)
        start.diffusion.config = replace(start.diffusion.config, prediction_type=kind)
        if refused:
            with pytest.raises(ValueError, match=r"pictures.new_components=32 would be full of noise at first"):
                training._grown(start)
        else:
            assert training._grown(start).code_size == start.code_size + 32


def test_learned_components_are_inverted_by_least_squares_and_kept_in_eight_bits(tmp_path: Path) -> None:
    data = toy()
    space = LearnedCodes.of(space_of("pca", data), 3)  # type: ignore[arg-type]
    codes_PZ = torch.randn(5, space.size)
    torch.testing.assert_close(space.encode(space.decode(codes_PZ)), codes_PZ, rtol=1e-3, atol=1e-3)
    start = untrained("pca")
    wide = widened(start.denoiser, start.diffusion.denoiser(space.size, 512, start.denoiser.config))
    made = Synthesizer(start.layout, space, wide, start.diffusion)
    for dtype, error in ((torch.float32, 0.0), (torch.float16, 1e-3), (torch.int8, 2e-2)):
        made.save_pretrained(tmp_path / str(dtype), dtype)
        again = Synthesizer.from_pretrained(tmp_path / str(dtype))
        found, expected = again.decode(codes_PZ), made.decode(codes_PZ)
        assert np.abs(found - expected).max() <= error * np.abs(expected).max()
        assert open_store(tmp_path / str(dtype)).read_json("config.json")["format_version"] == 2
    codes_PZ = torch.randn(20, space.size)
    codes_PZ[:, -2:] = 0  # nobody needs these
    few = space.truncated(space.size - 2, codes_PZ)
    again = build_codes(few.describe(), few.state_dict())
    assert len(again.components_KM) == space.size - 2
    torch.testing.assert_close(again.decode(codes_PZ), space.decode(codes_PZ), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.decode(again.encode(again.decode(codes_PZ))), again.decode(codes_PZ))
    start.save_pretrained(tmp_path / "one")
    assert open_store(tmp_path / "one").read_json("config.json")["format_version"] == 1
