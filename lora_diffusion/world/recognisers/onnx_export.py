"""ONNX files that insightface takes: which graph, which names, half-precision weights.

insightface tells models apart by their graph: nine outputs make a detector, a square input of 112 px a recogniser; a
recogniser whose first nodes are called "Sub" and "Mul" would be fed raw pixels, so ours has none of that name.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lora_diffusion.world.recognisers.detector import FaceDetector, ScrfdOutputs

OPSET = 17


def export_recogniser(model: nn.Module, path: Path, half: bool = True) -> None:
    """(B, 3, 112, 112) -> (B, 512), the mean over a crop and its mirror image (`look_twice`).

    `half` stores the weights in 16 bits; arithmetic stays in 32.
    """
    example = torch.zeros(1, 3, 112, 112)
    _export(model, example, path, ["embedding"], {"input": {0: "batch"}, "embedding": {0: "batch"}}, half)
    onnx.save(look_twice(onnx.load(str(path))), str(path))


def export_detector(model: FaceDetector, path: Path, half: bool = True) -> None:
    """(1, 3, H, W) -> scores of strides 8, 16, 32, boxes, landmarks: (cells × 2, 1 | 4 | 10) each."""
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    axes = {"input": {2: "height", 3: "width"}} | {name: {0: f"anchors_{name}"} for name in names}
    _export(ScrfdOutputs(model), torch.zeros(1, 3, 128, 128), path, names, axes, half)


def _export(
    model: nn.Module, example: torch.Tensor, path: Path, outputs: list[str], axes: dict[str, dict[int, str]], half: bool
) -> None:
    model.eval()
    with warnings.catch_warnings():
        # The older exporter needs no package beside onnx, and folds batch normalisation into the convolutions.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, opset_version=OPSET, input_names=["input"], output_names=outputs,
            dynamic_axes=axes,
        )  # fmt: skip
    graph = onnx.load(str(path))
    if half:
        halve_weights(graph)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def halve_weights(model: onnx.ModelProto, smallest: int = 256) -> None:
    """Replaces float32 weights of `smallest` numbers or more by float16 ones and a Cast back, in place."""
    graph = model.graph
    casts: list[onnx.NodeProto] = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or int(np.prod(weight.dims)) < smallest:
            continue
        values = numpy_helper.to_array(weight)
        if np.abs(values).max() >= 6e4:
            raise ValueError(f"{weight.name} does not fit into 16 bits")
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name + "_half"))
        casts.append(helper.make_node("Cast", [name + "_half"], [name], f"Cast_{len(casts)}", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)


def look_twice(model: onnx.ModelProto) -> onnx.ModelProto:
    """The recogniser that answers the mean of its embeddings of a crop and of the crop's mirror image, in one run.

    How ArcFace's authors evaluate theirs (insightface, `recognition/arcface_torch/eval/verification.py`), put into the
    graph, so that everyone who runs the file gets it. Twice the arithmetic, the same weights.
    """
    twice = onnx.ModelProto()
    twice.CopyFrom(model)
    graph = twice.graph
    inside, outside = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["crop_and_mirror" if name == inside else name for name in node.input]
        node.output[:] = ["both" if name == outside else name for name in node.output]
    numbers = {"from_last": [-1], "to_first": [np.iinfo(np.int64).min], "width_axis": [3], "backwards": [-1]}
    for name, values in numbers.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    before = [
        helper.make_node("Slice", [inside, *numbers], ["mirror"], "mirror"),
        helper.make_node("Concat", [inside, "mirror"], ["crop_and_mirror"], "crop_and_mirror", axis=0),
    ]
    after = [
        helper.make_node("Split", ["both"], ["of_crop", "of_mirror"], "split", axis=0),
        helper.make_node("Mean", ["of_crop", "of_mirror"], [outside], "mean_of_both"),
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(before + nodes + after)
    onnx.checker.check_model(twice)
    return twice
