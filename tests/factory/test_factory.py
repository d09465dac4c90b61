"""Laws of the factory without Ray: bad photos cost only themselves, and the same photos give the same rows."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from factory_world import make_config
from PIL import Image
from tiny_pipeline import tiny_pipeline

from lora_diffusion.corpus import CorpusReader, Failure, Person, ShardPlan, open_corpus
from lora_diffusion.faces import apart
from lora_diffusion.faces.embedder import mean_embedding
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.config import CorpusConfig, PhotoConfig
from lora_diffusion.factory.embed import EmbeddedPerson, PersonEmbedder, mean_pairwise_cosine, square_picture
from lora_diffusion.factory.errors import CommonFault
from lora_diffusion.factory.isolate import embed_people
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.factory.shard import ShardMaker
from lora_diffusion.storage import open_store


@pytest.fixture
def config(world: Path, tmp_path: Path) -> CorpusConfig:
    return make_config(world, people=str(world / "people"), output=str(tmp_path / "corpus"))


@pytest.fixture(scope="module")
def photo(world: Path) -> Image.Image:
    return Image.open(world / "people" / "person-020000" / "00.jpg").convert("RGB")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_by_exif(photo: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encode(photo.rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def two_people(photo: Image.Image) -> bytes:
    both = Image.new("RGB", (2 * photo.width, photo.height))
    both.paste(photo, (0, 0))
    both.paste(photo, (photo.width, 0))
    return encode(both, "PNG")


BAD: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "empty.jpg": (lambda photo: b"", "empty_file"),
    "cut.jpg": (lambda photo: encode(photo, "JPEG")[:-600], "truncated"),
    "bomb.png": (lambda photo: encode(Image.new("1", (10_000, 10_000)), "PNG"), "too_large"),
    "text.png": (lambda photo: b"this is no picture", "not_an_image"),
    "wall.png": (lambda photo: encode(Image.new("RGB", (64, 64), (90, 120, 150)), "PNG"), "no_face"),
    "two.png": (two_people, "several_faces"),
    "plain copy.JPEG": (lambda photo: encode(photo, "JPEG"), "duplicate"),
}
GOOD: dict[str, Callable[[Image.Image], bytes]] = {
    "alpha.png": lambda photo: encode(photo.convert("RGBA"), "PNG"),
    "cmyk.jpg": lambda photo: encode(photo.convert("CMYK"), "JPEG", quality=95),
    "exif.jpg": rotated_by_exif,
    "grey16.png": lambda photo: encode(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
    "one.JPEG": lambda photo: encode(photo, "JPEG"),
    "without end.jpg": lambda photo: encode(photo, "JPEG", quality=96)[:-2],
}


def test_each_bad_photo_is_a_row_with_its_reason_and_the_good_ones_are_used(
    config: CorpusConfig, photo: Image.Image, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "people")
    for name, (make, _) in BAD.items():
        store.write(f"Zoë 😀/{name}", make(photo))
    for name, make_good in GOOD.items():
        store.write(f"Zoë 😀/{name}", make_good(photo))
    embed = PersonEmbedder(dataclasses.replace(config, people=str(tmp_path / "people")), picture_size=16)
    person = embed(7, PersonRef("Zoë 😀"))
    left_out = {(f.photo, f.reason) for f in person.failures if f.stage != "kept"}
    assert left_out == {(name, reason) for name, (_, reason) in BAD.items()}
    assert [(f.photo, f.reason) for f in person.failures if f.stage == "kept"] == [("without end.jpg", "truncated")]
    assert all(f.message and (f.position, f.identity) == (7, "Zoë 😀") for f in person.failures)
    assert person.usable
    assert person.photos().pixels.shape == (len(GOOD), 16, 16, 3)
    assert len(set(person.photo_sha256)) == len(GOOD)
    assert person.embedding is not None
    assert np.linalg.norm(person.embedding) == pytest.approx(1)
    assert person.photo_similarity > 0.5, "it is the same photo, five times"
    assert person.photo_embeddings is not None
    assert np.allclose(mean_embedding(person.photo_embeddings), person.embedding)
    boxes_P4 = person.photos().face_boxes
    assert boxes_P4 is not None
    assert boxes_P4.shape == (len(GOOD), 4)
    assert (boxes_P4[:, 2:] - boxes_P4[:, :2] > 4).all(), "px of the pictures of 16 × 16"


def test_a_photo_that_takes_too_long_is_a_row_and_the_others_are_used(
    config: CorpusConfig, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "SECONDS", 0.05)
    store = open_store(tmp_path / "people")
    store.write("ada/large.jpg", encode(Image.new("RGB", (4100, 4000)), "JPEG"))
    for kind in ("PNG", "JPEG"):
        store.write(f"ada/usual.{kind}", encode(photo, kind))
    person = PersonEmbedder(dataclasses.replace(config, people=str(tmp_path / "people")), 16)(0, PersonRef("ada"))
    (failure,) = person.failures
    assert (failure.photo, failure.stage, failure.reason) == ("large.jpg", "read", "unreadable")
    assert "takes more than 0.05 s" in failure.message
    assert person.usable


FACES = Path(__file__).resolve().parents[1] / "data" / "faces"


@pytest.mark.parametrize(
    ("photos", "left_out"),
    [
        (["80000-0", "80000-1", "80003-1", "80000-2"], ["80003-1"]),
        (["80000-0", "80003-1", "80003-2", "80003-5", "80007-2"], ["80000-0", "80007-2"]),
        (["80000-0", "80000-1", "80000-2"], []),
        (["80000-0", "80000-1", "80003-1", "80003-2"], ["80000-0", "80000-1", "80003-1", "80003-2"]),
        (["80000-0", "80003-1"], ["80000-0", "80003-1"]),
    ],
)
def test_photos_of_another_person_are_left_out_of_the_mean_and_are_rows_with_their_cosine(
    config: CorpusConfig, tmp_path: Path, photos: list[str], left_out: list[str]
) -> None:
    (tmp_path / "people" / "ada").mkdir(parents=True)
    for name in photos:
        shutil.copy(FACES / f"{name}.png", tmp_path / "people" / "ada")
    embed = PersonEmbedder(dataclasses.replace(config, people=str(tmp_path / "people")), picture_size=16)
    person = embed(0, PersonRef("ada"))
    rows = [failure for failure in person.failures if failure.reason == "another_person"]
    assert [row.photo for row in rows] == [f"{name}.png" for name in left_out]
    assert all(re.search(r"cosine -?0\.\d\d, photos.same_person is 0.2", row.message) for row in rows)
    assert person.usable == (len(left_out) < len(photos))
    if person.usable:
        assert len(person.pictures) == len(photos) - len(left_out)
        kept = [
            embed.embedder.embed(load_photo(FACES / f"{name}.png")).vector for name in photos if name not in left_out
        ]
        assert np.allclose(person.embedding, mean_embedding(np.stack(kept)), atol=1e-5)
    everybody = dataclasses.replace(config.photos, same_person=None)
    embed = PersonEmbedder(dataclasses.replace(config, people=str(tmp_path / "people"), photos=everybody), 16)
    assert len(embed(0, PersonRef("ada")).pictures) == len(photos)


def test_a_person_with_too_few_good_photos_is_a_failure_that_says_why(config: CorpusConfig, tmp_path: Path) -> None:
    store = open_store(tmp_path / "people")
    for i in range(3):
        store.write(f"a/{i}.jpg", b"")
    (tmp_path / "people" / "b").mkdir()
    embed = PersonEmbedder(dataclasses.replace(config, people=str(tmp_path / "people")), picture_size=16)
    whole = [f for f in embed(0, PersonRef("a")).failures if f.photo is None]
    assert [(f.reason, f.message) for f in whole] == [
        ("too_few_photos", "0 of 3 photos can be used, at least 2 are needed (3 × empty_file)")
    ]
    assert [f.reason for f in embed(1, PersonRef("b")).failures] == ["no_photos"]
    namesakes = PersonRef("c", problem=("duplicate_identity", "two rows"))
    assert [f.reason for f in embed(2, namesakes).failures] == ["duplicate_identity"]


def test_a_photo_without_a_caption_takes_none_from_the_others(world: Path, tmp_path: Path) -> None:
    people = tmp_path / "people" / "ada"
    people.mkdir(parents=True)
    for index, photo in enumerate(sorted((world / "people" / "person-020000").glob("*.jpg"))[:2]):
        (people / f"{index}.jpg").write_bytes(photo.read_bytes())
    config = make_config(world, people=str(people.parent), output=str(tmp_path / "corpus"))
    assert PersonEmbedder(config, 16)(0, PersonRef("ada")).captions is None
    (people / "1.txt").write_text("a photo of sks person on a beach")
    told = PersonEmbedder(config, 16)(0, PersonRef("ada")).captions
    prompt = config.finetune.instance_prompt
    assert told == (prompt, "a photo of sks person on a beach")


def test_without_consent_nobody_is_read_if_it_is_required(world: Path, tmp_path: Path) -> None:
    people = tmp_path / "people"
    for name in ("person-020000", "person-020001"):
        shutil.copytree(world / "people" / name, people / name)
    (people / "person-020000" / "consent.txt").write_text("form 17")
    config = make_config(world, people=str(people), output="unused")
    asked, any_ = (PersonEmbedder(dataclasses.replace(config, require_consent=ask), 16) for ask in (True, False))
    assert [one(0, PersonRef("person-020000")).consent for one in (asked, any_)] == ["form 17"] * 2
    assert any_(1, PersonRef("person-020001")).usable
    (failure,) = asked(1, PersonRef("person-020001")).failures
    assert (failure.photo, failure.stage, failure.reason) == (None, "read", "no_consent")


def test_the_face_crop_holds_the_face_and_stays_in_the_photo() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[10:30, 150:170] = 255
    box = np.array([150, 10, 170, 30], np.float32)
    crop, within = square_picture(pixels, 40, box, PhotoConfig(crop="face", face_margin=2.0))
    assert crop.shape == (40, 40, 3)
    assert (crop > 128).mean() == pytest.approx(0.25, abs=0.02), "the face is 20 of 40 px on each side"
    assert within.tolist() == [10, 10, 30, 30]
    assert (crop[10:30, 10:30] > 128).mean() > 0.9
    at_the_edge = np.array([190, 0, 200, 10], np.float32)
    corner, within = square_picture(pixels, 40, at_the_edge, PhotoConfig(crop="face", face_margin=2.5))
    assert corner.shape == (40, 40, 3)
    assert within.tolist() == [24, 0, 40, 16]
    middle, within = square_picture(pixels, 50, box, PhotoConfig(crop="centre"))
    assert middle.shape == (50, 50, 3)
    assert within.tolist() == [50, 5, 60, 15], "outside: the crop has cut the face away"


def test_mean_pairwise_cosine_is_the_mean_over_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [vectors[i] @ vectors[j] for i in range(5) for j in range(i)]
    assert mean_pairwise_cosine(vectors) == pytest.approx(np.mean(pairs))
    assert np.isnan(mean_pairwise_cosine(vectors[:1]))


@pytest.fixture(scope="module")
def embedded(world: Path) -> list[EmbeddedPerson]:
    config = make_config(world, people=str(world / "people"), output="unused")
    embed = PersonEmbedder(config, picture_size=16)
    people = [(i, PersonRef(f"person-{20_000 + i:06d}")) for i in range(4)]
    return embed_people(embed, people, InMemoryAttempts(), 3)


def rows(answers: list[Person | Failure]) -> list[tuple[object, ...]]:
    """What must not differ between two runs."""
    return [
        (a.position, a.identity, a.vector.tobytes(), a.embedding.tobytes(), a.similarity, a.loss)
        if isinstance(a, Person)
        else (a.position, a.identity, a.reason)
        for a in answers
    ]


def test_the_same_people_give_the_same_bits_in_another_process_as_well(
    config: CorpusConfig, embedded: list[EmbeddedPerson]
) -> None:
    maker = LoRAMaker(config)
    first = maker(embedded)
    assert all(isinstance(answer, Person) for answer in first)
    assert rows(maker(embedded)) == rows(first)
    assert rows(LoRAMaker(config)(embedded)) == rows(first), "a fresh worker"


def test_rows_say_what_they_were_made_of(config: CorpusConfig, embedded: list[EmbeddedPerson]) -> None:
    maker = LoRAMaker(config)
    for person, source in zip(maker(embedded), embedded, strict=True):
        assert isinstance(person, Person)
        assert person.vector.shape == (maker.layout.size,)
        assert (person.identity, person.photo_sha256) == (source.identity, source.photo_sha256)
        assert (person.steps, person.seed, person.num_photos) == (2, 0, 2)
        assert np.isfinite([person.similarity, person.base_similarity, person.loss]).all()
        assert -1 <= person.similarity <= 1


def test_a_diverged_lora_is_a_failure_and_no_row(config: CorpusConfig, embedded: list[EmbeddedPerson]) -> None:
    wild = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, learning_rate=1e30, steps=4))
    answers = LoRAMaker(wild)(embedded)
    assert [a.reason for a in answers if isinstance(a, Failure)] == ["diverged"] * 4


def test_the_quality_gate_turns_rows_into_failures(config: CorpusConfig, embedded: list[EmbeddedPerson]) -> None:
    strict = dataclasses.replace(config, score=dataclasses.replace(config.score, min_similarity=0.99))
    answers = LoRAMaker(strict)(embedded)
    assert [a.reason for a in answers if isinstance(a, Failure)] == ["low_similarity"] * 4
    assert "score.min_similarity is 0.99" in answers[0].message  # type: ignore[union-attr]


def test_without_prompts_nothing_is_rendered(config: CorpusConfig, embedded: list[EmbeddedPerson]) -> None:
    blind = dataclasses.replace(config, score=dataclasses.replace(config.score, prompts=()))
    answers = LoRAMaker(blind)(embedded[:1])
    assert isinstance(answers[0], Person)
    assert np.isnan(answers[0].similarity)


def test_class_images_change_the_lora(config: CorpusConfig, embedded: list[EmbeddedPerson]) -> None:
    prior = dataclasses.replace(config, class_images=2)
    with_prior, without = LoRAMaker(prior)(embedded[:1])[0], LoRAMaker(config)(embedded[:1])[0]
    assert isinstance(with_prior, Person)
    assert isinstance(without, Person)
    assert not np.array_equal(with_prior.vector, without.vector)


def test_what_decides_bits_is_in_the_recipe_and_what_does_not_is_not(config: CorpusConfig) -> None:
    base = json.dumps(config.recipe("x"))
    for change in (
        {"people": "elsewhere"},
        {"output": "elsewhere"},
        {"device": "cuda"},
        {"limit": 3},
        {"require_consent": True},
        {"workers": dataclasses.replace(config.workers, finetune_max=9)},
    ):
        assert json.dumps(dataclasses.replace(config, **change).recipe("x")) == base  # type: ignore[arg-type]
    for change in (
        {"dtype": "bfloat16"},
        {"vector_dtype": "float16"},
        {"people_per_group": 7},
        {"class_images": 7},
        {"photos": PhotoConfig(max_photos=7)},
        {"finetune": dataclasses.replace(config.finetune, steps=77)},
        {"score": dataclasses.replace(config.score, seeds_per_prompt=7)},
    ):
        assert json.dumps(dataclasses.replace(config, **change).recipe("x")) != base, change  # type: ignore[arg-type]
    assert json.dumps(config.recipe("y")) != base
    assert json.dumps(config.recipe("x", start="0123")) != base


def test_a_shard_is_committed_whole_and_one_of_another_base_is_refused(
    config: CorpusConfig, embedded: list[EmbeddedPerson], tmp_path: Path
) -> None:
    open_corpus(open_store(config.output), LoRAMaker(config).manifest())
    shard = ShardPlan(0, 0, tuple(person.identity for person in embedded), people_per_group=2)
    agreed = [dataclasses.replace(embedded[0], consent="form 17"), *embedded[1:]]
    report = ShardMaker(config, InMemoryAttempts())(shard, agreed)
    assert (report.num_people, report.failed) == (4, {})
    assert CorpusReader(config.output).identities == list(shard.identities)
    assert CorpusReader(config.output).table(["consent"])["consent"].to_pylist() == ["form 17", None, None, None]
    other = tmp_path / "other"
    torch.manual_seed(1)
    tiny_pipeline(seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match=r"this worker differs from the corpus at .*base.fingerprint"):
        ShardMaker(dataclasses.replace(config, base=str(other)), InMemoryAttempts())


def test_a_trial_on_noise_finds_what_would_fail_for_everybody(
    config: CorpusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoRAMaker(dataclasses.replace(config, class_images=2)).try_out()
    half = dataclasses.replace(config, dtype="float16")
    with pytest.raises(ValueError, match="the base model is in float16"):
        LoRAMaker(half).try_out()
    maker = LoRAMaker(config)
    monkeypatch.setattr(maker.embedder, "embed_crops", lambda crops: crops @ np.zeros(5))
    with pytest.raises(CommonFault, match="fails on pictures of noise: matmul"):
        maker.try_out()
    maker = LoRAMaker(config)
    with torch.no_grad():
        maker.base.unet.conv_in.weight.mul_(1e38)  # finite, but nothing that comes of it is
    with pytest.raises(CommonFault, match="no finite loss or gradient in float32"):
        maker.try_out()


def test_a_fault_of_everybody_commits_nothing_and_once_it_is_mended_everybody_is_made(
    config: CorpusConfig, embedded: list[EmbeddedPerson], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(config.output)
    open_corpus(store, LoRAMaker(config).manifest())
    shard = ShardPlan(0, 0, tuple(person.identity for person in embedded), people_per_group=2)
    make = ShardMaker(config, InMemoryAttempts())
    with monkeypatch.context() as patch:
        patch.setattr(make.maker.base.tokenizer, "model_max_length", 10**30)  # as without tokenizer_config.json
        with pytest.raises(CommonFault, match="OverflowError"):
            make(shard, embedded)
    assert store.files("shards") == store.files("failures") == {}
    assert make(shard, embedded).num_people == len(embedded)
