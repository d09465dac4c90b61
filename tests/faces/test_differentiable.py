"""The recogniser with gradients answers what onnxruntime answers, or says which operator it lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lora_diffusion.faces.differentiable import OnnxNetwork, Teacher
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.faces.photos import load_photo

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "faces").glob("*"))[:6]


def test_the_teacher_embeds_as_the_embedder_and_its_gradient_reaches_the_face() -> None:
    embedder = FaceEmbedder(EmbedderConfig("tiny"))
    pixels = np.stack([load_photo(path) for path in PHOTOS])
    pictures = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).requires_grad_()
    teacher = Teacher(embedder)
    boxes, points, seen = teacher.faces(pictures)
    assert seen.all()
    mine, theirs = teacher(pictures, points), np.stack([embedder.embed(picture).vector for picture in pixels])
    assert (mine.detach().numpy() * theirs).sum(1).min() > 0.9999
    (1 - mine[:, 0]).sum().backward()
    inside, outside = [], []
    for (x1, y1, x2, y2), change in zip(boxes.round().astype(int), pictures.grad.abs().sum(1), strict=True):
        inside.append(change[max(y1, 0) : y2, max(x1, 0) : x2].mean())
        outside.append(change[:4, :4].mean())
    assert min(inside) > 0
    assert np.mean(inside) > 5 * np.mean(outside)
    shaken = teacher(pictures, points, torch.tensor([[0.3, 0.0, 6.0, 0.0]]).repeat(len(pictures), 1))
    assert (shaken.detach().numpy() * theirs).sum(1).max() < 0.99


def test_a_picture_without_a_face_is_said_to_have_none() -> None:
    teacher = Teacher(FaceEmbedder(EmbedderConfig("tiny")))
    assert teacher.faces(torch.zeros(2, 3, 64, 64))[2].tolist() == [False, False]


def save(path: Path, kind: str, weights: list[np.ndarray], **attributes: object) -> Path:
    names = [f"w{i}" for i in range(len(weights))]
    node = helper.make_node(kind, ["x", *names], ["y"], **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [onnx.numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], tensors)), str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "weights", "attributes"),
    [
        ("Conv", [(6, 2, 3, 3), (6,)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}),
        ("BatchNormalization", [(4,), (4,), (4,), (4,)], {"epsilon": 1e-3}),
        ("PRelu", [(4, 1, 1)], {}),
        ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Gemm", [(5, 9), (5,)], {"transB": 1, "alpha": 0.5}),
    ],
)
def test_operators_of_recognisers_answer_as_onnxruntime(
    tmp_path: Path, kind: str, weights: list, attributes: dict
) -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    path = save(tmp_path / "n.onnx", kind, [rng.uniform(0.1, 1, size).astype("f") for size in weights], **attributes)
    x = rng.normal(size=(3, 9) if kind == "Gemm" else (2, 4, 9, 8)).astype("f")
    model = onnx.load(str(path))
    model.ir_version, model.opset_import[0].version = 8, 17
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(OnnxNetwork(path)(torch.from_numpy(x)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_operator_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="operator NonZero cannot be turned into torch"):
        OnnxNetwork(save(tmp_path / "n.onnx", "NonZero", []))
    (tmp_path / "cut.onnx").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as ONNX"):
        OnnxNetwork(tmp_path / "cut.onnx")
