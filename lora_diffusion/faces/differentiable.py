"""A recogniser that gradients flow through: its ONNX file as a torch network, and the aligned crop that it looks at.

Axes: B pictures, C channels, H / W pixels, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.faces.crops import CROP_SIZE, alignment
from lora_diffusion.faces.embedder import FaceEmbedder

Operator = Callable[[list[Any], dict[str, Any]], Any]


class OnnxNetwork(nn.Module):
    """The graph of an ONNX file, node by node in torch. Frozen; float16 weights are widened once.

    Raises ValueError for a file that cannot be read, or an operator that is not known here: it names the operator.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        import onnx
        from onnx import numpy_helper

        try:
            graph = onnx.load(str(path)).graph
        except Exception as error:
            raise ValueError(f"{path} cannot be read as ONNX: {error}") from error
        values = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy()) for weight in graph.initializer}
        self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        for node in graph.node:
            if node.op_type not in OPERATORS:
                raise ValueError(
                    f"{path}: the operator {node.op_type} cannot be turned into torch; known are {', '.join(OPERATORS)}. "
                    "Export the recogniser with these, or teach with another one"
                )
            attributes = {a.name: _attribute(onnx, a) for a in node.attribute}
            if all(name in values for name in node.input) and node.op_type in ("Cast", "Constant"):
                values[node.output[0]] = OPERATORS[node.op_type]([values[name] for name in node.input], attributes)
            else:
                self.nodes.append((node.op_type, list(node.input), list(node.output), attributes))
        used = {name for _, inputs, _, _ in self.nodes for name in inputs}
        self.places = {name: f"value_{i}" for i, name in enumerate(sorted(used & values.keys()))}
        for name, place in self.places.items():
            value = values[name]
            self.register_buffer(place, value.float() if value.is_floating_point() else value)
        (self.input,) = (entry.name for entry in graph.input if entry.name not in values)
        self.output = graph.output[0].name
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.between({self.input: x}, [self.output])[0]

    def between(self, given: dict[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The values of these names from values of others, by the graph's names. Raises ValueError where they do not follow."""
        values: dict[str, Any] = {name: self.get_buffer(place) for name, place in self.places.items()} | given
        for kind, inputs, outputs, attributes in self.nodes:
            if all(name in values for name in wanted):
                break
            if all(name in values for name in inputs if name):
                found = OPERATORS[kind]([values[name] if name else None for name in inputs], attributes)
                values.update(zip(outputs, found if isinstance(found, tuple) else (found,), strict=False))
        if missing := [name for name in wanted if name not in values]:
            raise ValueError(f"{', '.join(missing)} does not follow from {', '.join(given)} in this ONNX graph")
        return [values[name] for name in wanted]


def _attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    return value.decode() if isinstance(value, bytes) else value


def _padded(x: Tensor, attributes: dict[str, Any], value: float = 0.0) -> Tensor:
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(
            f"auto_pad {attributes['auto_pad']} of an ONNX layer is not known here: export with plain pads"
        )
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=value) if top + left + bottom + right else x


def _conv(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x, weight, *bias = inputs
    return F.conv2d(
        _padded(x, a),
        weight,
        bias[0] if bias else None,
        a.get("strides", 1),
        0,
        a.get("dilations", 1),
        a.get("group", 1),
    )


def _gemm(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x, weight, *bias = inputs
    x, weight = (x.T if a.get("transA") else x), (weight.T if a.get("transB") else weight)
    answer: Tensor = a.get("alpha", 1.0) * (x @ weight)
    return answer + a.get("beta", 1.0) * bias[0] if bias else answer


def _slice(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x, starts, ends, axes, steps = [*inputs, None, None][:5]
    axes = range(len(starts)) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes, steps, strict=True):
        places = range(x.shape[axis])[slice(start, None if end < -x.shape[axis] else end, step)]
        x = x.index_select(axis, torch.tensor(places, device=x.device))
    return x


def _split(inputs: list[Any], a: dict[str, Any]) -> tuple[Tensor, ...]:
    x, axis = inputs[0], a.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return x.split(inputs[1].tolist(), axis)
    return x.chunk(a.get("num_outputs", 2), axis)


def _reshape(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x, shape = inputs[0], inputs[1].tolist()
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _average_pool(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    if any(a.get("pads", ())) and not a.get("count_include_pad"):
        raise ValueError("an ONNX AveragePool with pads that do not count is not known here: export it without pads")
    return F.avg_pool2d(_padded(inputs[0], a), a["kernel_shape"], a.get("strides", 1))


def _batch_norm(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x, weight, bias, mean, var = inputs
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, a.get("epsilon", 1e-5))


def _prelu(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    return F.prelu(inputs[0], inputs[1].flatten())


OPERATORS: dict[str, Operator] = {
    "Add": lambda i, a: i[0] + i[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda i, a: i[0].float() if i[0].is_floating_point() else i[0],
    "Concat": lambda i, a: torch.cat(i, a["axis"]),
    "Constant": lambda i, a: a["value"],
    "Conv": _conv,
    "Div": lambda i, a: i[0] / i[1],
    "Dropout": lambda i, a: i[0],
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, a: i[0].mean((2, 3), keepdim=True),
    "Identity": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "MatMul": lambda i, a: i[0] @ i[1],
    "MaxPool": lambda i, a: F.max_pool2d(_padded(i[0], a, -torch.inf), a["kernel_shape"], a.get("strides", 1)),
    "Mean": lambda i, a: torch.stack(i).mean(0),
    "Mul": lambda i, a: i[0] * i[1],
    "PRelu": _prelu,
    "Relu": lambda i, a: F.relu(i[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
    "Slice": _slice,
    "Split": _split,
    "Sub": lambda i, a: i[0] - i[1],
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
}


class Teacher(nn.Module):
    """The recogniser of an embedder with gradients: pictures (B, 3, H, W) in -1 .. 1, RGB -> unit embeddings (B, E).

    Where the face is, is found by the embedder's detector and passes no gradient.
    """

    def __init__(self, embedder: FaceEmbedder) -> None:
        super().__init__()
        recogniser = embedder.recogniser
        self.network = OnnxNetwork(recogniser.model_file)
        # insightface feeds (pixel - mean) / std: 127.5 both, or raw pixels to networks that normalise by themselves
        self.mean, self.std = recogniser.input_mean, recogniser.input_std
        self.embedder = embedder

    def faces(self, pictures_BCHW: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Boxes (B, 4) and five points (B, 5, 2) of the largest face, px, and whether there is one (B,)."""
        pixels = ((pictures_BCHW.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        found = [self.embedder.locate(picture) for picture in pixels.cpu().numpy()]
        boxes = np.stack([np.zeros(4, np.float32) if face is None else face[0] for face in found])
        points = np.stack([np.zeros((5, 2), np.float32) if face is None else face[1] for face in found])
        return boxes, points, np.array([face is not None for face in found])

    def forward(
        self, pictures_BCHW: Tensor, points_B52: NDArray[np.float32], jitter_B4: Tensor | None = None
    ) -> Tensor:
        """`jitter_B4`: turn (radian), log of the scale, shift right and down (px of the crop), for each crop."""
        crops = aligned(pictures_BCHW, points_B52, jitter_B4)
        return F.normalize(self.network((crops * 127.5 + 127.5 - self.mean) / self.std).float(), dim=1)


def aligned(pictures_BCHW: Tensor, points_B52: NDArray[np.float32], jitter_B4: Tensor | None = None) -> Tensor:
    """(B, 3, 112, 112) crops at the recogniser's template, bilinear, black outside; gradients flow to the pictures."""
    B, _, H, W = pictures_BCHW.shape
    to_crop = np.tile(np.eye(3), (B, 1, 1))
    to_crop[:, :2] = alignment(points_B52)
    jitter = np.zeros((B, 4)) if jitter_B4 is None else jitter_B4.double().cpu().numpy()
    middle, half = (CROP_SIZE - 1) / 2, CROP_SIZE / 2
    scale, turn = np.exp(jitter[:, 1]), jitter[:, 0]
    shaken = np.tile(np.eye(3), (B, 1, 1))
    shaken[:, 0, 0] = shaken[:, 1, 1] = scale * np.cos(turn)
    shaken[:, 1, 0] = scale * np.sin(turn)
    shaken[:, 0, 1] = -shaken[:, 1, 0]
    shaken[:, :2, 2] = middle + jitter[:, 2:] - np.einsum("bij,j->bi", shaken[:, :2, :2], [middle, middle])
    # affine_grid's coordinates are -1 .. 1 from edge to edge; pixel centres lie half a pixel inside
    from_unit = np.array([[half, 0, middle], [0, half, middle], [0, 0, 1]])
    to_unit = np.array([[2 / W, 0, 1 / W - 1], [0, 2 / H, 1 / H - 1], [0, 0, 1]])
    theta = torch.from_numpy((to_unit @ np.linalg.inv(to_crop) @ shaken @ from_unit)[:, :2])
    grid = F.affine_grid(theta.to(pictures_BCHW), [B, 3, CROP_SIZE, CROP_SIZE], align_corners=False)
    return F.grid_sample(pictures_BCHW + 1, grid, "bilinear", "zeros", align_corners=False) - 1
