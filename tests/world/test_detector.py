"""The tiny detector speaks SCRFD's format: what it is taught is what insightface decodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from insightface.model_zoo import model_zoo
from insightface.model_zoo.scrfd import SCRFD
from torch import Tensor

from lora_diffusion.world.recognisers.composites import Labelled, compose
from lora_diffusion.world.recognisers.detector import DetectorConfig, FaceDetector, detection_loss, targets
from lora_diffusion.world.recognisers.detector_training import DetectorTrainingConfig, as_batch, train_detector
from lora_diffusion.world.recognisers.onnx_export import export_detector


def ellipses(count: int, seed: int = 0) -> Labelled:
    """Bright discs with two dark eyes and a mouth on dark photos: enough of a face to learn in a minute."""
    rng = np.random.default_rng(seed)
    photos, points, boxes = [], [], []
    ys, xs = np.mgrid[0:64, 0:64] + 0.5
    for _ in range(count):
        x, y, r = rng.uniform(26, 38), rng.uniform(26, 38), rng.uniform(14, 20)
        image = np.full((64, 64, 3), rng.integers(0, 60, 3), np.float64)
        image[np.hypot(xs - x, (ys - y) * 0.8) < r] = rng.integers(150, 256, 3)
        five = np.array([[-0.4, -0.4], [0.4, -0.4], [0, 0.1], [-0.3, 0.6], [0.3, 0.6]]) * r + [x, y]
        for px, py in five:
            image[np.hypot(xs - px, ys - py) < 2] = 20
        photos.append(image.astype(np.uint8))
        points.append(five)
        boxes.append([x - r, y - r * 1.25, x + r, y + r * 1.25])
    return Labelled(np.stack(photos), np.array(points, np.float32), np.array(boxes, np.float32))


class Told(FaceDetector):
    """A detector that answers given maps, to test the format apart from the learning."""

    def __init__(self, maps_BCHW: Tensor) -> None:
        super().__init__()
        self.register_buffer("maps", maps_BCHW)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        maps: Tensor = self.maps + 0 * x_B3HW.mean()  # type: ignore[operator]
        return maps


def loaded(path: Path) -> SCRFD:
    detector = model_zoo.get_model(str(path), providers=["CPUExecutionProvider"])
    assert isinstance(detector, SCRFD)
    detector.prepare(0, input_size=(128, 128), det_thresh=0.5)
    return detector


@pytest.mark.parametrize("faces", [0, 1, 2])
def test_what_targets_encode_insightface_decodes(faces: int, tmp_path: Path) -> None:
    composite = compose(ellipses(4), 128, np.random.default_rng(faces), faces)
    _, boxes, points, present = as_batch([composite])
    score, values, _ = targets(boxes, points, present, 8, 8)
    assert (score.sum() > 0) == (faces > 0)
    maps = torch.cat([(score[:, None] * 2 - 1) * 9, values], 1)
    export_detector(Told(maps), tmp_path / "det.onnx", half=False)
    found, kps = loaded(tmp_path / "det.onnx").detect(np.ascontiguousarray(composite.canvas[..., ::-1]))
    assert len(found) == faces
    for box, five in zip(composite.boxes, composite.points, strict=True):
        nearest = int(np.abs(found[:, :4] - box).sum(1).argmin())
        assert np.abs(found[nearest, :4] - box).max() < 1e-2
        assert np.abs(kps[nearest] - five).max() < 1e-2


def test_boxes_are_in_pixels_of_a_photo_of_any_size(tmp_path: Path) -> None:
    composite = compose(ellipses(4), 128, np.random.default_rng(5), 1)
    _, boxes, points, present = as_batch([composite])
    score, values, _ = targets(boxes, points, present, 8, 8)
    export_detector(Told(torch.cat([(score[:, None] * 2 - 1) * 9, values], 1)), tmp_path / "det.onnx")
    found, _ = loaded(tmp_path / "det.onnx").detect(np.zeros((256, 256, 3), np.uint8))
    assert np.abs(found[0, :4] / 2 - composite.boxes[0]).max() < 0.5


def test_the_file_is_small_and_has_scrfds_nine_outputs(tmp_path: Path) -> None:
    export_detector(FaceDetector().eval(), tmp_path / "det.onnx")
    assert (tmp_path / "det.onnx").stat().st_size <= 400_000
    detector = loaded(tmp_path / "det.onnx")
    assert detector.use_kps
    for side in (128, 256):
        blob = np.zeros((1, 3, side, side), np.float32)
        outputs = detector.session.run(detector.output_names, {detector.input_name: blob})
        cells = [(side // stride) ** 2 * 2 for stride in (8, 16, 32)]
        assert [o.shape for o in outputs] == [(n, width) for width in (1, 4, 10) for n in cells]


def test_the_loss_of_the_truth_is_least() -> None:
    composites = [compose(ellipses(8), 128, np.random.default_rng(i), i % 3) for i in range(6)]
    _, boxes, points, present = as_batch(composites)
    score, values, weight = targets(boxes, points, present, 8, 8)
    truth = torch.cat([(score[:, None] * 2 - 1) * 12, values], 1)
    at_truth = float(detection_loss(truth, score, values, weight))
    assert at_truth < 1e-2
    for channel in (0, 2, 8):
        wrong = truth.clone()
        wrong[:, channel] += 1.5 if channel else 14
        assert float(detection_loss(wrong, score, values, weight)) > at_truth + 0.1


def test_cells_at_the_border_of_a_face_count_for_neither() -> None:
    boxes = torch.tensor([[[16.0, 16, 112, 112]]])
    score, _, weight = targets(boxes, torch.zeros(1, 1, 5, 2), torch.ones(1, 1, dtype=torch.bool), 8, 8)
    assert score[0, 4, 4] == 1
    assert weight[0, 4, 4] == 1
    assert weight[0, 4, 6] == 0  # at x 96, between the middle of the face and its border
    assert (score[0, 0, 0], weight[0, 0, 0]) == (0, 1)


@pytest.mark.parametrize("faces", [0, 1, 2])
def test_a_composite_holds_as_many_faces_as_asked_inside_the_canvas(faces: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(30):
        composite = compose(ellipses(6), 128, rng, faces)
        assert composite.canvas.shape == (128, 128, 3)
        assert composite.boxes.shape == (faces, 4)
        assert composite.points.shape == (faces, 5, 2)
        assert (composite.points >= 0).all()
        assert (composite.points <= 128).all()


def test_training_learns_where_faces_are_and_repeats_itself() -> None:
    config = DetectorTrainingConfig(steps=45, batch_size=8, bf16=False, report_every=15)
    runs: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(0)
        losses: list[float] = []
        model = FaceDetector(DetectorConfig((8, 16, 32), 2))
        train_detector(model, ellipses(50), config, lambda figures, told=losses: told.append(figures["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.6 * runs[0][0]
