"""Attribute directions: what a beard, or age, changes in the code, fitted from rows with labels.

All attributes are fitted together, code = mean + Σ_a y_a β_a + rest, by least squares on standardised labels y: β_a is what
attribute a changes while the others stay, so that a direction for "beard" is not also one for "man". (weights2weights
takes the normal of a linear classifier, one attribute at a time, and strengths are raw numbers up to 1.5e6.)
Strength is in standard deviations of the corpus along the direction: 1 is a usual difference, 3 an extreme person.

Axes: P labelled rows, A attributes, Z code size, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttributeDirections:
    """Unit directions in code space, and what one standard deviation of the corpus is along each.

    separation_A: how well the projection on the direction tells the labels: correlation with them, -1 to 1.
    """

    names: tuple[str, ...]
    directions_AZ: Tensor
    std_A: Tensor
    separation_A: Tensor

    @classmethod
    def fit(cls, codes_PZ: Tensor, labels: Mapping[str, Sequence[float] | NDArray[np.floating]]) -> AttributeDirections:
        """Labels: one number for each row, binary or not; NaN where it is unknown (the row is then left out).

        Raises:
            ValueError: no labels, other lengths, too few rows, or labels that are constant or copies of each other.
        """
        if not labels:
            raise ValueError("no labels were given: name at least one attribute")
        for name, values in labels.items():
            if len(values) != len(codes_PZ):
                raise ValueError(f"{name!r} has {len(values)} labels for {len(codes_PZ)} codes; give one for each")
        y_PA = torch.stack([torch.as_tensor(np.asarray(values, np.float64)) for values in labels.values()], 1)
        known_P = torch.isfinite(y_PA).all(1)
        y_PA, codes = y_PA[known_P], codes_PZ.double().cpu()[known_P]
        if len(y_PA) <= len(labels) + 1:
            raise ValueError(f"{len(y_PA)} rows have all labels; more than {len(labels) + 1} are needed")
        spread_A = y_PA.std(0, correction=0)
        flat = [name for name, spread in zip(labels, spread_A.tolist(), strict=True) if spread == 0]
        if flat:
            raise ValueError(f"all rows have the same {', '.join(flat)}: there is no difference to learn from")
        y_PA = (y_PA - y_PA.mean(0)) / spread_A
        x_PZ = codes - codes.mean(0)
        if torch.linalg.matrix_rank(y_PA) < y_PA.shape[1]:
            raise ValueError("some attributes follow from others (a copy, or a sum): leave one of them out")
        effect_AZ = torch.linalg.lstsq(y_PA, x_PZ).solution
        directions_AZ = torch.nn.functional.normalize(effect_AZ, dim=1)
        along_PA = x_PZ @ directions_AZ.T
        std_A = along_PA.std(0, correction=0)
        separation_A = (along_PA * y_PA).mean(0) / std_A.clamp(min=1e-12)
        return cls(tuple(labels), directions_AZ.float(), std_A.float(), separation_A.float())

    def edit(self, codes_BZ: Tensor, attribute: str, strength: float) -> Tensor:
        """Codes moved by `strength` standard deviations towards more of `attribute`; negative: less."""
        if attribute not in self.names:
            raise ValueError(f"unknown attribute {attribute!r}; directions were fitted for {', '.join(self.names)}")
        a = self.names.index(attribute)
        return codes_BZ + strength * (self.std_A[a] * self.directions_AZ[a]).to(codes_BZ)

    def tensors(self) -> dict[str, Tensor]:
        return {"directions_AZ": self.directions_AZ, "std_A": self.std_A, "separation_A": self.separation_A}


def slerp(a_BZ: NDArray[np.floating], b_BZ: NDArray[np.floating], t: float) -> NDArray[np.float32]:
    """From a (t = 0) to b (t = 1) along the great circle; lengths go from one to the other in a straight line.

    The straight line between two codes passes nearer to the mean than people are: their codes lie on a shell. Parallel
    codes are mixed linearly; so are opposite ones, for which no circle is shorter than another.
    """
    a, b = np.asarray(a_BZ, np.float64), np.asarray(b_BZ, np.float64)
    length_a, length_b = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    unit_a, unit_b = a / np.maximum(length_a, 1e-12), b / np.maximum(length_b, 1e-12)
    angle = np.arccos(np.clip((unit_a * unit_b).sum(-1, keepdims=True), -1, 1))
    straight = np.sin(angle) < 1e-6
    sine = np.where(straight, 1, np.sin(angle))
    weight_a = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    weight_b = np.where(straight, t, np.sin(t * angle) / sine)
    length = (1 - t) * length_a + t * length_b
    return np.asarray((weight_a * unit_a + weight_b * unit_b) * length, np.float32)
