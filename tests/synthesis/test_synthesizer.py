"""The synthesiser as a user meets it: one folder, embeddings in, LoRAs out, whatever the company."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from synthesis_world import CONSTANT, LAYOUT, SMALL, toy, untrained

from lora_diffusion.artifacts import checksum
from lora_diffusion.synthesis import Synthesizer
from lora_diffusion.synthesis.edits import AttributeDirections
from lora_diffusion.synthesis.synthesizer import LatentSampling, Neighbours, Provenance

FACES = Path(__file__).parents[1] / "data" / "faces"


def embeddings(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, 512)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def complete(kind: str = "pca", prior: str = "gaussian", linear_guess: bool = False) -> Synthesizer:
    """With directions, neighbours and provenance."""
    model, data = untrained(kind, prior, replace(SMALL, linear_guess=linear_guess)), toy()
    codes = torch.from_numpy(model.encode(data.vectors_PN))
    model.directions = AttributeDirections.fit(codes, {"first": data.traits_PT[:, 0].numpy()})
    model.neighbours = Neighbours(data.embeddings_PC, codes)
    model.provenance = Provenance(base={"name": "toy", "fingerprint": "0"}, figures={"similarity": 0.5}, seed=3)
    return model


@pytest.mark.parametrize("linear_guess", [False, True])
@pytest.mark.parametrize(("kind", "prior"), [("latent", "gaussian"), ("pca", "corpus"), ("vector", "gaussian")])
def test_a_loaded_folder_gives_the_same_bits(tmp_path: Path, kind: str, prior: str, linear_guess: bool) -> None:
    model = complete(kind, prior, linear_guess)
    model.save_pretrained(tmp_path)
    again = Synthesizer.from_pretrained(tmp_path)
    faces = embeddings(2)
    assert np.array_equal(
        model.from_embedding(faces, guidance_scale=2.0, num_inference_steps=5),
        again.from_embedding(faces, guidance_scale=2.0, num_inference_steps=5),
    )
    codes = model.encode(toy().vectors_PN[:3])
    assert np.array_equal(codes, again.encode(toy().vectors_PN[:3]))
    assert np.array_equal(model.edit(codes, "first", 1.5), again.edit(codes, "first", 1.5))
    assert [a.tolist() for a in model.nearest(faces)] == [a.tolist() for a in again.nearest(faces)]
    assert again.provenance == model.provenance
    assert again.layout == model.layout


@pytest.mark.parametrize("linear_guess", [False, True])
def test_a_folder_in_half_precision_is_smaller_and_nearly_the_same(tmp_path: Path, linear_guess: bool) -> None:
    model = complete("latent", linear_guess=linear_guess)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    size = {n: sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("full", "half")}
    assert size["half"] < 0.75 * size["full"]
    full, half = (Synthesizer.from_pretrained(tmp_path / n).from_embedding(embeddings(2)) for n in ("full", "half"))
    assert np.array_equal(full[:, :CONSTANT], half[:, :CONSTANT])
    assert np.linalg.norm(full - half) < 0.02 * np.linalg.norm(full - full.mean(0))


def test_what_a_face_gives_does_not_depend_on_the_other_faces() -> None:
    """To float error. Samples of one face stand together; one of them alone is the first."""
    model, faces = untrained(), embeddings(4)
    together = model.from_embedding(faces, num_samples=3, seed=5, guidance_scale=2.0, num_inference_steps=6)
    assert together.shape == (12, LAYOUT.size)
    assert together.dtype == np.float32
    for i, face in enumerate(faces):
        alone = model.from_embedding(face, num_samples=1, seed=5, guidance_scale=2.0, num_inference_steps=6)
        np.testing.assert_allclose(together[3 * i : 3 * i + 1], alone, rtol=1e-4, atol=1e-4)
    halves = model.decode(model.denoise(np.repeat(faces, 3, 0), [5, 6, 7] * 4, 2.0, 6))
    assert np.array_equal(halves, together)  # the two stages of the endpoint are the whole


def test_best_of_keeps_the_samples_that_score_highest() -> None:
    model, faces = untrained(), embeddings(2)
    codes = model.denoise(np.repeat(faces, 6, 0), [*range(6), *range(6)], 1.0, 5)
    scores = model.score(codes, np.repeat(faces, 6, 0)).reshape(2, 6)
    wanted = [6 * face + i for face in range(2) for i in np.argsort(-scores[face], kind="stable")[:2]]
    best = model.from_embedding(faces, num_samples=2, best_of=3, num_inference_steps=5)
    assert np.array_equal(best, model.decode(codes)[wanted])


def test_the_length_of_an_embedding_does_not_matter() -> None:
    model, face = untrained(), embeddings(1)
    np.testing.assert_allclose(
        model.denoise(face, [0], 1.0, 4), model.denoise(torch.from_numpy(23 * face), [0], 1.0, 4), atol=1e-5
    )


def test_deviation_scale_scales_the_deviation_from_the_mean() -> None:
    model = untrained()
    mean_N = model.codes.normaliser.mean_N.numpy()
    codes = model.denoise(embeddings(3), [0, 1, 2], 1.0, 4)
    plain, twice, mean = (model.decode(codes, scale) for scale in (1.0, 2.0, 0.0))
    np.testing.assert_allclose(twice - mean_N, 2 * (plain - mean_N), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, np.broadcast_to(mean_N, mean.shape), atol=1e-6)
    assert np.array_equal(twice[:, :CONSTANT], plain[:, :CONSTANT])
    assert np.array_equal(plain[0, :CONSTANT], toy().vectors_PN[0, :CONSTANT].numpy())


def test_a_face_is_drawn_as_the_folder_recommends(tmp_path: Path) -> None:
    model = untrained()
    model.latent_sampling = LatentSampling(
        guidance_scale=1.5, num_inference_steps=4, temperature=0.5, deviation_scale=2.5
    )
    model.save_pretrained(tmp_path)
    model, face = Synthesizer.from_pretrained(tmp_path), embeddings(1)
    recommended = model.from_embedding(face)
    assert np.array_equal(recommended, model.from_embedding(face, **asdict(model.latent_sampling)))
    for name, other in {
        "guidance_scale": 1.0,
        "num_inference_steps": 5,
        "temperature": 1.0,
        "deviation_scale": 1.0,
    }.items():
        assert not np.allclose(recommended, model.from_embedding(face, **{name: other})), name
    codes = model.denoise(face, [0], 1.5, 4, 0.5)
    assert np.array_equal(model.decode(codes), model.from_embedding(face, deviation_scale=1.0))


def test_people_without_a_face_differ_by_their_seed() -> None:
    model = untrained()
    people = model.sample(3, seed=10, num_inference_steps=4)
    assert people.shape == (3, LAYOUT.size)
    np.testing.assert_allclose(people[1:], model.sample(2, seed=11, num_inference_steps=4), rtol=1e-4, atol=1e-4)
    assert not np.allclose(people[0], people[1])
    model.latent_sampling = LatentSampling(temperature=0.0)  # for faces: nobody's noise stays whole
    assert np.array_equal(people, model.sample(3, seed=10, num_inference_steps=4))


def test_interpolation_walks_the_great_circle_at_even_speed() -> None:
    model = untrained()
    a, b = 2 * np.eye(model.code_size)[None, :2].transpose(1, 0, 2)
    assert np.allclose(model.interpolate(a, b, 0), a)
    assert np.allclose(model.interpolate(a, b, 1), b)
    path = np.concatenate([model.interpolate(a, b, t) for t in np.linspace(0, 1, 7)])
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 2, rtol=1e-6)
    steps = (path[1:] * path[:-1]).sum(1) / 4
    np.testing.assert_allclose(np.arccos(steps), np.pi / 12, rtol=1e-5)
    np.testing.assert_allclose(model.interpolate(a[0], 3 * a[0], 0.5), 2 * a[0])  # parallel: lengths alone
    assert np.isfinite(model.interpolate(a, -a, 0.3)).all()
    assert np.isfinite(model.interpolate(a, 0 * a, 0.5)).all()


def test_the_nearest_person_of_the_corpus_is_the_one_asked_about() -> None:
    model = complete()
    rows, cosines = model.nearest(toy().embeddings_PC[7:10])
    assert rows.tolist() == [7, 8, 9]
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    with pytest.raises(ValueError, match="no corpus people"):
        untrained().nearest(embeddings(1))


def test_a_photo_gives_the_lora_of_its_embedding() -> None:
    from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
    from lora_diffusion.faces.photos import load_photo

    model, photo = untrained(), FACES / "80000-0.png"
    embedder = FaceEmbedder(EmbedderConfig(model="tiny"))
    from_photo = model.from_photo(photo, num_inference_steps=3)  # loads the recogniser that provenance names
    vector = embedder.embed(load_photo(photo)).vector
    assert np.array_equal(from_photo, model.from_embedding(vector, num_inference_steps=3))
    assert np.array_equal(from_photo, model.from_photo(load_photo(photo), embedder=embedder, num_inference_steps=3))
    with pytest.raises(ValueError, match="shows no face"):
        model.from_photo(np.full((64, 64, 3), 128, np.uint8))


def test_several_photos_are_one_person_between_them(tmp_path: Path) -> None:
    from PIL import Image

    from lora_diffusion.faces.embedder import FaceEmbedder, mean_embedding
    from lora_diffusion.faces.photos import load_photo

    model, embedder, photos = untrained(), FaceEmbedder(), [FACES / "80000-0.png", FACES / "80000-1.png"]
    mean = mean_embedding([embedder.embed(load_photo(photo)) for photo in photos])
    forms = [photos[0].read_bytes(), Image.open(photos[1])]
    expected = model.from_embedding(mean, num_samples=2, num_inference_steps=3, seed=4)
    for given in (photos, tuple(map(str, photos)), forms):
        found = model.from_photo(given, num_samples=2, num_inference_steps=3, seed=4, embedder=embedder)
        assert np.array_equal(found, expected)


def test_a_photo_of_another_person_is_left_out_with_a_warning() -> None:
    from lora_diffusion.faces.choice import FaceError
    from lora_diffusion.faces.embedder import FaceEmbedder

    model, embedder = untrained(), FaceEmbedder()
    ada, again, bob = (FACES / name for name in ("80000-0.png", "80000-1.png", "80001-1.png"))
    expected = model.from_photo([ada, again], num_inference_steps=3, embedder=embedder)
    with pytest.warns(UserWarning, match=r"^80001-1.png shows another person .* was left out$") as told:
        found = model.from_photo([ada, bob, again], num_inference_steps=3, embedder=embedder)
    assert np.array_equal(found, expected)
    assert told[0].filename == __file__
    with pytest.raises(FaceError, match=r"different people .*80000-0.png .*80001-1.png"):
        model.from_photo([ada, bob], embedder=embedder)


def two_people() -> np.ndarray:
    from lora_diffusion.faces.photos import load_photo

    return np.concatenate([load_photo(FACES / name) for name in ("80000-0.png", "80001-1.png")], 1)


@pytest.mark.parametrize(
    ("photos", "message"),
    [
        ([], "no photo was given: give at least one of the person"),
        ("{tmp}/empty.jpg", "empty.jpg: The file has 0 bytes"),
        ("{tmp}/text.jpg", "text.jpg: The file is no image that we read"),
        ("{tmp}", r".*: This is a folder: give the photos in it."),
        ([b"", b""], "Photo 1: The file has 0 bytes"),
        (
            np.zeros((64, 64, 3)),
            r"the photo is ndarray \(float64 \(64, 64, 3\)\): give a path, bytes, a PIL image or uint8 RGB",
        ),
        (None, "the photo is NoneType"),
        (["{tmp}/two.png"], "two.png shows 2 faces. Crop it to one person, or ask for the largest: faces=largest."),
        ([two_people(), two_people()], "Photo 1 shows 2 faces"),
    ],
)
def test_what_is_no_photo_of_one_person_is_named(photos: object, message: str, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.fromarray(two_people()).save(tmp_path / "two.png")
    several = isinstance(photos, list)
    named = [p.format(tmp=tmp_path) if isinstance(p, str) else p for p in (photos if several else [photos])]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=message):
        untrained().from_photo(named if several else named[0])
    if "faces=largest" in message:
        assert untrained().from_photo(named, num_inference_steps=2, faces="largest").shape == (1, LAYOUT.size)


def test_vectors_in_the_place_of_codes_are_told() -> None:
    model = complete()
    vectors, codes = model.sample(2, num_inference_steps=2), model.encode(model.sample(2, num_inference_steps=2))
    hint = r"codes have shape \(.*\); expected .*: these are LoRA vectors; encode\(vectors\) gives their codes"
    for call in (
        lambda: model.interpolate(vectors[0], vectors[1], 0.5),
        lambda: model.interpolate(codes[0], vectors[1], 0.5),
        lambda: model.edit(vectors, "first", 1.0),
    ):
        with pytest.raises(ValueError, match=hint):
            call()
    assert model.interpolate(codes[0], codes[1], 0.5).shape == (model.code_size,)


def test_it_says_what_it_is() -> None:
    model = complete()
    told = repr(model)
    for part in (f"vector_size={LAYOUT.size}", f"code_size={model.code_size}", "device='cpu'", "base='toy'"):
        assert part in told
    assert len(told) < 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "mps", ""])
def test_a_device_that_is_not_there_is_told_with_those_that_are(device: str) -> None:
    from lora_diffusion.models.stable_diffusion import BaseModel

    for place in (lambda: complete().to(device), lambda: BaseModel.from_pretrained("tiny-sd", device)):
        with pytest.raises(ValueError, match=f"there is no device '{device}' here; torch sees cpu"):
            place()
    assert complete().to("auto").device.type == "cpu"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(511), r"expected \(512,\) or \(B, 512\)"),
        (np.ones((1, 2, 512)), "expected"),
        (np.zeros(512), "zero or holds NaN"),
        (np.full(512, np.nan), "zero or holds NaN"),
        (np.array(["face"] * 512), "expected"),
    ],
)
def test_what_is_no_embedding_is_refused(value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untrained().from_embedding(value)


def test_a_folder_that_is_no_synthesiser_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Synthesizer.from_pretrained(tmp_path)
    complete().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(message: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            Synthesizer.from_pretrained(tmp_path)

    refused("expected format", format="lora-diffusion-corpus")
    refused("format version 9", format_version=9)
    refused("unknown config key 'colour'", denoiser={**config["denoiser"], "colour": 1})
    refused("cannot be read", denoiser={**config["denoiser"], "width": 48})
    for name in ("more", "../denoiser", "/etc/passwd", 3):
        refused("names a file", files=[*config["files"], name])
    refused("says it is", layout={**config["layout"], "alpha": 2.0})
    refused("cannot be read", code_size=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "denoiser.safetensors").read_bytes()
    (tmp_path / "denoiser.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Synthesizer.from_pretrained(tmp_path)
    (tmp_path / "denoiser.safetensors").unlink()
    with pytest.raises(ValueError, match="not whole"):
        Synthesizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["latent", "pca"])
def test_sizes_are_compared_with_the_tensors_before_room_is_made_for_them(tmp_path: Path, kind: str) -> None:
    (untrained(kind) if kind == "latent" else complete()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changes = [{name: size} for name in ("code_size", "condition_size") for size in (2**20, 10**15, 10**40, -1)]
    changes += [
        {section: {**config[section], name: 10**power}}
        for section, value in config.items()
        if section in ("denoiser", "diffusion")
        for name, number in value.items()
        if type(number) is int
        for power in (7, 20)
    ]
    if kind == "latent":
        vae = config["codes"]["vae"]
        sizes = ({"latent_size": 10**6}, {"latent_size": 10**20}, {"hidden": [10**6, 10**5]}, {"hidden": [10**20]})
        changes = [{"codes": {**config["codes"], "vae": {**vae, **size}}} for size in sizes]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match="cannot be read"):
            Synthesizer.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def test_tensors_of_another_code_space_beside_the_network_are_refused(tmp_path: Path) -> None:
    complete().save_pretrained(tmp_path)
    for name in ("neighbours", "edits"):
        path = tmp_path / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(save({key: tensor[..., :-1].clone() for key, tensor in load(whole).items()}))
        with pytest.raises(ValueError, match="of another synthesiser"):
            Synthesizer.from_pretrained(tmp_path)
        path.write_bytes(whole)


def test_every_changed_byte_of_the_tensors_is_noticed_and_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    complete().save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.glob("*.safetensors")):
        whole = path.read_bytes()
        for at in rng.integers(len(whole), size=40):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
            with pytest.raises(ValueError, match="cannot be read"):
                Synthesizer.from_pretrained(tmp_path)
        path.write_bytes(whole)
    Synthesizer.from_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(save(load(path.read_bytes())))  # as earlier releases wrote it
    config = checksum.unsealed(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - {"belong"}}))
    Synthesizer.from_pretrained(tmp_path)


def test_parts_that_do_not_fit_are_refused() -> None:
    pca, vector = untrained("pca"), untrained("vector")
    with pytest.raises(ValueError, match="do not fit"):
        Synthesizer(LAYOUT, pca.codes, vector.denoiser, pca.diffusion)


def test_lora_vectors_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match="layout"):
        untrained().encode(np.zeros((1, 5), np.float32))


@pytest.mark.s3
def test_a_synthesiser_lives_in_a_bucket_as_well(bucket: str) -> None:
    model = complete()
    model.save_pretrained(f"s3://{bucket}/synthesiser")
    again = Synthesizer.from_pretrained(f"s3://{bucket}/synthesiser")
    assert np.array_equal(model.from_embedding(embeddings(1)), again.from_embedding(embeddings(1)))
