"""The embedder on real pictures of held-out people, through insightface's own detection and alignment."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from insightface.app import FaceAnalysis

from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.crops import TEMPLATE
from lora_diffusion.faces.embedder import BUNDLED, EmbedderConfig, FaceEmbedder, mean_embedding, model_folder
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.faces.search import FaceEmbedding

PICTURES = Path(__file__).parents[1] / "data" / "faces"
PEOPLE = ("80000", "80001", "80003", "80007")


def picture(person: str, view: int) -> np.ndarray:
    """One of three photos, all with the person's usual glasses or none; file names end in the number of the view."""
    return load_photo(sorted(PICTURES.glob(f"{person}-*.png"), key=lambda path: int(path.stem.split("-")[1]))[view])


@pytest.fixture(scope="module", params=[name for name, folder in BUNDLED.items() if (folder / "rec.onnx").exists()])
def embedder(request: pytest.FixtureRequest) -> FaceEmbedder:
    return FaceEmbedder(EmbedderConfig(model=request.param))


def on_canvas(*photos: np.ndarray) -> np.ndarray:
    canvas = np.full((128, 128, 3), 90, np.uint8)
    for i, photo in enumerate(photos):
        canvas[32:96, 64 * i : 64 * i + 64] = photo
    return canvas


def test_a_face_is_found_where_it_is(embedder: FaceEmbedder) -> None:
    for person in PEOPLE:
        face = embedder.embed(picture(person, 0))
        assert face.vector.shape == (512,)
        assert face.vector.dtype == np.float32
        assert np.linalg.norm(face.vector) == pytest.approx(1, abs=1e-5)
        assert face.det_score > 0.5
        assert face.crop.shape == (112, 112, 3)
        left, top, right, bottom = face.box
        assert left < face.kps[:, 0].mean() < right
        assert top < face.kps[:, 1].mean() < bottom
        assert face.kps[:2, 1].mean() < face.kps[2, 1] < face.kps[3:, 1].mean()  # eyes above the nose above the mouth


def test_the_nearest_person_is_the_person(embedder: FaceEmbedder) -> None:
    gallery = np.stack([mean_embedding([embedder.embed(picture(p, v)) for v in (0, 1)]) for p in PEOPLE])
    probes = np.stack([embedder.embed(picture(p, 2)).vector for p in PEOPLE])
    scores = probes @ gallery.T
    assert (scores.argmax(1) == np.arange(len(PEOPLE))).all()
    assert np.diag(scores).mean() > scores[~np.eye(len(PEOPLE), dtype=bool)].mean() + 0.3


def test_the_answer_is_insightfaces_own(embedder: FaceEmbedder) -> None:
    app = FaceAnalysis(name=str(model_folder(embedder.config)), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(128, 128))
    photo = picture("80001", 0)
    (theirs,) = app.get(np.ascontiguousarray(photo[..., ::-1]))
    ours = embedder.embed(photo)
    assert np.allclose(ours.vector, theirs.normed_embedding, atol=1e-5)
    assert np.allclose(ours.kps, theirs.kps, atol=1e-4)


def test_crops_are_rgb_not_bgr(embedder: FaceEmbedder) -> None:
    crops = np.stack([embedder.embed(picture(p, 0)).crop for p in PEOPLE])
    right, swapped = embedder.embed_crops(crops), embedder.embed_crops(np.ascontiguousarray(crops[..., ::-1]))
    assert (right * swapped).sum(1).mean() < 0.9


def test_a_larger_photo_gives_the_same_face_in_its_own_pixels(embedder: FaceEmbedder) -> None:
    photo = picture("80000", 1)
    small, large = embedder.embed(photo), embedder.embed(cv2.resize(photo, (256, 256), interpolation=cv2.INTER_CUBIC))
    assert float(small.vector @ large.vector) > 0.9
    assert np.abs(large.kps / 4 - small.kps).max() < 2


def test_no_face_and_two_faces_have_their_reasons(embedder: FaceEmbedder) -> None:
    grey, two = np.full((64, 64, 3), 120, np.uint8), on_canvas(picture("80000", 0), picture("80001", 0))
    with pytest.raises(FaceError, match="no face") as caught:
        embedder.embed(grey)
    assert caught.value.reason == "no_face"
    with pytest.raises(FaceError, match="2 faces") as caught:
        embedder.embed(two)
    assert caught.value.reason == "several_faces"
    answers = embedder.embed_batch([grey, picture("80000", 0), two])
    assert [getattr(a, "reason", "face") for a in answers] == ["no_face", "face", "several_faces"]


def test_the_largest_of_several_faces_can_be_taken() -> None:
    largest = FaceEmbedder(EmbedderConfig(several_faces="largest"))
    alone = largest.embed(picture("80001", 0))
    both = largest.embed(on_canvas(picture("80000", 0), picture("80001", 0)))
    assert isinstance(both, FaceEmbedding)
    assert alone.vector.shape == both.vector.shape


def test_a_face_below_the_smallest_size_is_refused() -> None:
    strict = FaceEmbedder(EmbedderConfig(min_face=60))
    with pytest.raises(FaceError, match="60 px") as caught:
        strict.embed(picture("80000", 0))
    assert caught.value.reason == "face_too_small"


def test_crops_embed_as_photos_do(embedder: FaceEmbedder) -> None:
    faces = [embedder.embed(picture(p, v)) for p in PEOPLE for v in (0, 1)]
    vectors = embedder.embed_crops(np.stack([f.crop for f in faces]), batch_size=3)
    assert np.allclose(vectors, np.stack([f.vector for f in faces]), atol=1e-4)
    assert embedder.embed_crops(np.zeros((0, 112, 112, 3), np.uint8)).shape == (0, 512)


@pytest.mark.parametrize("bad", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3))])
def test_another_kind_of_image_is_refused(bad: np.ndarray) -> None:
    embedder = FaceEmbedder()
    with pytest.raises(ValueError, match="RGB uint8"):
        embedder.embed(bad)
    with pytest.raises(ValueError, match="RGB uint8"):
        embedder.embed_crops(bad[None])


def test_the_mean_embedding_is_a_unit_vector_between_the_photos(embedder: FaceEmbedder) -> None:
    faces = [embedder.embed(picture("80000", v)) for v in (0, 1)]
    mean = mean_embedding(faces)
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-5)
    assert float(mean @ faces[0].vector) == pytest.approx(float(mean @ faces[1].vector), abs=1e-5)
    assert np.allclose(mean, mean_embedding(np.stack([5 * f.vector for f in faces])), atol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        mean_embedding([])


def test_a_pack_that_is_not_there_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_download"):
        FaceEmbedder(EmbedderConfig(model="buffalo_l", root=str(tmp_path)))


@pytest.mark.parametrize("inner", ["my_pack", "my_pack/my_pack"], ids=["as buffalo_l unpacks", "as antelopev2 unpacks"])
def test_a_pack_in_its_root_or_by_its_folder_is_used(tmp_path: Path, inner: str) -> None:
    shutil.copytree(BUNDLED["tiny"], tmp_path / "models" / inner)
    photo, tiny = picture("80003", 1), FaceEmbedder()
    for model in ("my_pack", str(tmp_path / "models" / "my_pack")):
        pack = FaceEmbedder(EmbedderConfig(model=model, root=str(tmp_path), det_size=128))
        assert np.array_equal(pack.embed(photo).vector, tiny.embed(photo).vector)
        assert pack.fingerprint == tiny.fingerprint


def test_folders_that_hold_no_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.onnx"):
        FaceEmbedder(EmbedderConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="no folder"):
        FaceEmbedder(EmbedderConfig(model=str(tmp_path / "absent")))
    shutil.copy(BUNDLED["tiny"] / "det.onnx", tmp_path / "det.onnx")
    with pytest.raises(ValueError, match="no recognition model"):
        FaceEmbedder(EmbedderConfig(model=str(tmp_path)))
    (tmp_path / "det.onnx").unlink()
    shutil.copy(BUNDLED["tiny"] / "rec.onnx", tmp_path / "rec.onnx")
    with pytest.raises(ValueError, match="no detector that insightface knows"):
        FaceEmbedder(EmbedderConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"<html>", "cannot be loaded")],
)
def test_a_model_that_is_no_onnx_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    shutil.copytree(BUNDLED["tiny"], tmp_path / "pack")
    (tmp_path / "pack" / "det.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        FaceEmbedder(EmbedderConfig(model=str(tmp_path / "pack")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EmbedderConfig(det_thresh=1.5), "det_thresh"),
        (EmbedderConfig(det_size=100), "multiple of 32"),
        (EmbedderConfig(providers=("MoonProvider",)), "MoonProvider"),
        (EmbedderConfig(several_faces="all"), "largest"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_setting_is_named(config: EmbedderConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaceEmbedder(config)


def test_a_face_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FaceError("no_face", "none")))
    assert (error.reason, str(error)) == ("no_face", "none")


def test_the_template_is_arcfaces() -> None:
    from insightface.utils.face_align import arcface_dst

    np.testing.assert_array_equal(TEMPLATE, arcface_dst)
    assert TEMPLATE.dtype == arcface_dst.dtype
