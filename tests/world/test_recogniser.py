"""Laws of the recogniser: its loss, its input, its files, its training that goes on where it stopped."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.utils.face_align import estimate_norm
from torch.nn import functional as F

from lora_diffusion.faces.crops import alignment
from lora_diffusion.world.recognisers.crops import aligned_crops, augment, to_input
from lora_diffusion.world.recognisers.files import build_recogniser, load_recogniser, save_recogniser
from lora_diffusion.world.recognisers.network import (
    ArcFaceHead,
    FaceRecogniser,
    RecogniserConfig,
)
from lora_diffusion.world.recognisers.onnx_export import export_recogniser
from lora_diffusion.world.recognisers.training import RecogniserTrainer, TrainingConfig, embed_crops

ARCHITECTURES = ["resnet", "patches"]
SMALL = RecogniserConfig(widths=(8, 8, 16), blocks=(1, 1, 1), bottleneck=4)


def random_crops(count: int, seed: int = 0, size: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def built(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_recogniser(RecogniserConfig(architecture=architecture)).eval()


def test_arcface_is_its_formula() -> None:
    torch.manual_seed(1)
    head = ArcFaceHead(people=5, scale=16.0, margin=0.3)
    embeddings, person = torch.randn(7, 512), torch.arange(7) % 5
    cosine = F.normalize(embeddings) @ F.normalize(head.centres_PE).T
    expected = []
    for row, label in zip(cosine, person, strict=True):
        logits = 16.0 * row
        logits[label] = 16.0 * torch.cos(torch.acos(row[label]) + 0.3)
        expected.append(-F.log_softmax(logits, 0)[label])
    assert torch.allclose(head(embeddings, person), torch.stack(expected).mean(), atol=1e-5)


def test_arcface_without_margin_is_cross_entropy_of_cosines() -> None:
    torch.manual_seed(2)
    head = ArcFaceHead(people=4, scale=8.0, margin=0.0)
    embeddings, person = torch.randn(6, 512), torch.arange(6) % 4
    logits = 8.0 * F.normalize(embeddings) @ F.normalize(head.centres_PE).T
    assert torch.allclose(head(embeddings, person), F.cross_entropy(logits, person), atol=1e-5)


def test_arcface_falls_as_the_angle_falls_even_beyond_the_margin() -> None:
    head = ArcFaceHead(people=2, scale=8.0, margin=0.5)
    with torch.no_grad():
        head.centres_PE.copy_(torch.eye(2, 512))
    angles = torch.linspace(0, torch.pi, 50)
    losses = [
        head(torch.stack([a.cos(), torch.zeros(()), a.sin(), *torch.zeros(509)])[None], torch.tensor([0])).item()
        for a in angles
    ]
    assert all(later >= earlier - 1e-5 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_crop_and_its_half_give_the_same_embedding(architecture: str) -> None:
    model = built(architecture)
    crops = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        full, half = model(crops), model(F.avg_pool2d(crops, 2))
    assert full.shape == (2, 512)
    assert torch.allclose(full, half, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 112, 112), (3, 112, 112), (1, 3, 112, 56)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_shape_is_refused_with_the_way_out(architecture: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="norm_crop"):
        built(architecture)(torch.zeros(shape))


def test_features_of_any_size_move_with_the_picture() -> None:
    model = built("resnet")
    assert isinstance(model, FaceRecogniser)
    photo = torch.rand(1, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        maps, moved = model.features(photo), model.features(torch.roll(photo, 8, dims=3))
    assert [m.shape[-1] for m in maps] == [48, 24, 12]
    # Fully convolutional: 8 px to the right are 4, 2 and 1 cells, away from the borders.
    assert torch.allclose(maps[0][..., 16:32, 16:28], moved[0][..., 16:32, 20:32], atol=1e-4)


def test_features_pass_gradients_to_the_pixels() -> None:
    model = built("resnet")
    assert isinstance(model, FaceRecogniser)
    photo = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    sum(m.square().mean() for m in model.features(photo)).backward()
    assert photo.grad is not None
    assert float(photo.grad.abs().mean()) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_network_is_the_same_network(architecture: str, tmp_path: Path) -> None:
    config = RecogniserConfig(architecture=architecture)
    model = built(architecture)
    save_recogniser(model, config, tmp_path / "a.safetensors")
    loaded = load_recogniser(tmp_path / "a.safetensors")
    crops = random_crops(3)
    assert np.array_equal(embed_crops(model, crops), embed_crops(loaded, crops))


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"patches.*resnet"):
        build_recogniser(RecogniserConfig(architecture="mlp"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_exported_file_is_insightfaces_arcface_and_the_mean_of_crop_and_mirror(
    architecture: str, tmp_path: Path
) -> None:
    model, path = built(architecture), tmp_path / "rec.onnx"
    export_recogniser(model, path)
    assert path.stat().st_size <= 4e6
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arcface = ArcFaceONNX(str(path), session)
    assert (arcface.input_mean, arcface.input_std, arcface.input_size) == (127.5, 127.5, (112, 112))
    crops = random_crops(4, size=112)
    inputs = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        ours = (0.5 * (model(inputs) + model(inputs.flip(-1)))).numpy()
    assert np.abs(ours - model(inputs).detach().numpy()).max() > 1e-3  # the mirror image counts
    theirs = arcface.get_feat([crop[..., ::-1].copy() for crop in crops])  # insightface takes BGR
    assert np.allclose(ours, theirs, atol=2e-3 * np.abs(ours).max())
    assert np.allclose(theirs[1:2], arcface.get_feat([crops[1][..., ::-1].copy()]), atol=1e-4)  # alone as with others


def test_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    crops, person = random_crops(48)[None], np.repeat(np.arange(6), 8)
    config = TrainingConfig(epochs=3, batch_size=16, bf16=False)

    def trainer() -> RecogniserTrainer:
        torch.manual_seed(3)
        return RecogniserTrainer(FaceRecogniser(SMALL), crops, person, config)

    whole, stopped = trainer(), trainer()
    whole.model.dropout.p = stopped.model.dropout.p = 0.0  # type: ignore[union-attr]
    whole.train()

    class Stop(Exception):
        pass

    def interrupt(figures: dict[str, float]) -> None:
        if figures["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(tmp_path / "c.safetensors", interrupt)
    resumed = trainer()
    resumed.model.dropout.p = 0.0  # type: ignore[union-attr]
    resumed.load(tmp_path / "c.safetensors")
    assert resumed.epoch == 1
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_learns_to_tell_people_apart() -> None:
    rng = np.random.default_rng(4)
    faces = rng.integers(0, 256, (6, 7, 7, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    crops, person = faces.repeat(8, axis=0)[None], np.repeat(np.arange(6), 8)
    config = TrainingConfig(epochs=12, batch_size=16, bf16=False, margin=0.1)
    torch.manual_seed(5)
    trainer = RecogniserTrainer(FaceRecogniser(SMALL), crops, person, config)
    losses: list[float] = []
    trainer.train(report=lambda figures: losses.append(figures["loss"]))
    embeddings = embed_crops(trainer.model, faces)
    assert losses[-1] < 0.5 * losses[0]
    assert (embeddings @ embeddings.T - np.eye(6)).max() < 0.9


def test_crops_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        RecogniserTrainer(FaceRecogniser(SMALL), random_crops(4)[None], np.arange(5), TrainingConfig())


def test_alignment_equals_insightfaces() -> None:
    rng = np.random.default_rng(6)
    template = np.array([[20, 24], [40, 25], [30, 35], [22, 45], [38, 44]], np.float32)
    points = template + rng.normal(0, 3, (20, 5, 2)).astype(np.float32)
    expected = np.stack([estimate_norm(p) for p in points])
    assert np.abs(alignment(points) - expected).max() < 1e-3


def test_aligned_eyes_lie_where_arcface_wants_them() -> None:
    photo = np.zeros((1, 64, 64, 3), np.uint8)
    points = np.array([[[20, 24], [40, 24], [30, 35], [22, 45], [38, 45]]], np.float32)
    photo[0, 22:27, 18:23] = 255
    ys, xs = np.nonzero(aligned_crops(photo, points)[0, ..., 0] > 128)
    assert abs(xs.mean() - 38.3 / 2) < 2
    assert abs(ys.mean() - 51.6 / 2) < 2


def test_augmentation_keeps_range_and_shape_and_depends_on_the_generator_only() -> None:
    crops = to_input(random_crops(16))
    first, again, other = (augment(crops, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == crops.shape
    assert float(first.min()) >= -1
    assert float(first.max()) <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_never_mirrors() -> None:
    half = np.zeros((32, 56, 56, 3), np.uint8)
    half[:, :, :28] = 255  # bright on the left: so it must stay
    changed = augment(to_input(half), torch.Generator().manual_seed(3))
    assert bool((changed[..., 10:46, 4:20].mean((1, 2, 3)) > changed[..., 10:46, 36:52].mean((1, 2, 3))).all())


def test_the_clock_can_end_a_training() -> None:
    config = replace(TrainingConfig(batch_size=16, bf16=False), epochs=10_000, max_seconds=0.5)
    trainer = RecogniserTrainer(FaceRecogniser(SMALL), random_crops(48)[None], np.repeat(np.arange(6), 8), config)
    trainer.train()
    assert trainer.progress == 1.0
