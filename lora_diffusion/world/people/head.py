"""The head that everybody is a morph of: mesh, blendshapes, and what was computed from the mean head once.

Coordinates are head units (about 10 cm): x to the viewer's right, y up (chin 6.0, eyes 7.3, crown 8.3), z out of the
face. "Template coordinates" are those of the mean head: hair, brows and make-up are painted there, so they follow the
face whatever its shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from lora_diffusion.world.people.maths import Array, f32, smoothstep

MODEL_PATH = Path(__file__).resolve().parents[2] / "assets" / "head" / "face_model.npz"

# Materials of triangles and vertices. Left and right are the person's own (left: x > 0, at the viewer's right).
SKIN, LEFT_EYE, RIGHT_EYE, TEETH, TONGUE, LASHES, GLASSES = range(7)

SKULL_Y, SKULL_Z = 7.45, 0.45  # middle of the skull: the axis that angles of hair turn about


class MorphableHead:
    """Mesh and blendshapes; V vertices, T triangles. Treat the arrays as read-only: everybody shares them."""

    def __init__(self, data: Mapping[str, Array]) -> None:
        self.vertices = data["vertices"]  # (V, 3) float32, before any morph
        self.triangles = data["triangles"]  # (T, 3) int32
        self.triangle_materials = data["triangle_materials"]  # (T,) uint8
        self.vertex_materials = data["vertex_materials"]  # (V,) uint8
        # Blendshapes ("targets"), sparse: target i moves target_vertices[offsets[i]:offsets[i + 1]] by its deltas.
        self.targets = {str(name): i for i, name in enumerate(data["target_names"])}
        self._offsets = data["target_offsets"]
        self._target_vertices = data["target_vertices"]
        self._target_deltas = data["target_deltas"].astype(f32)
        self.lips = data["mask_lips"]  # (V,) 0..1, as are the next two
        self.ears = data["mask_ears"]
        self.inside_mouth = data["mask_inside_mouth"]
        self.left_eye: Array = self.vertex_materials == LEFT_EYE
        self.right_eye: Array = self.vertex_materials == RIGHT_EYE
        self.is_skin: Array = self.vertex_materials == SKIN
        mean = self.vertices.copy()
        self.add_macro(mean, gender=0.5, age=0.2, muscle=0.5, weight=0.5, ancestry=np.ones(3) / 3)
        self.mean: Array = mean.astype(f32)  # (V, 3): the template

    def add_target(self, vertices: Array, name: str, amount: float) -> None:
        """Adds ``amount`` times a blendshape to ``vertices`` (V, 3), in place. An unknown name is a KeyError."""
        i = self.targets[name]
        if amount == 0:
            return
        touched = slice(self._offsets[i], self._offsets[i + 1])
        vertices[self._target_vertices[touched]] += f32(amount) * self._target_deltas[touched]

    def add_macro(
        self,
        vertices: Array,
        gender: float,
        age: float,
        muscle: float,
        weight: float,
        ancestry: Sequence[float] | Array,
    ) -> None:
        """Adds the whole-head blendshapes: a multilinear mix over gender x age x (muscle x weight, ancestry)."""
        for gender_name, gender_share in (("female", 1 - gender), ("male", gender)):
            for age_name, age_share in (("young", 1 - age), ("old", age)):
                for muscle_name, muscle_share in _tent(muscle):
                    for weight_name, weight_share in _tent(weight):
                        if muscle_name == weight_name == "average":
                            continue  # the base mesh itself
                        name = f"macro:universal-{gender_name}-{age_name}-{muscle_name}muscle-{weight_name}weight"
                        self.add_target(vertices, name, gender_share * age_share * muscle_share * weight_share)
                for ancestry_name, ancestry_share in zip(("african", "asian", "caucasian"), ancestry, strict=True):
                    name = f"macro:{ancestry_name}-{gender_name}-{age_name}"
                    self.add_target(vertices, name, gender_share * age_share * ancestry_share)


class HeadModel(MorphableHead):
    """The head with what `precompute.py` found out about its mean, and where to look for the landmarks of a face."""

    def __init__(self, data: Mapping[str, Array]) -> None:
        super().__init__(data)
        self.ambient_occlusion = data["ambient_occlusion"]  # (V,) 0 hidden .. 1 open
        # The hull that hair grows from: a grid of R rows (crown to shoulder) x F angles.
        self.hull_phi = data["hull_phi"]  # (R, F) radians, 0 in front
        self.hull_points = data["hull_points"]  # (R, F, 3) on the mean head
        self.hull_directions = data["hull_directions"]  # (R, F, 3) outwards
        self.hull_clearance = data["hull_clearance"]  # (R, F) how far out of the hull long hair hangs, head units
        self.hull_height = data["hull_height"]  # (R, F) template y
        self.hull_neighbours = data["hull_neighbours"]  # (R * F, 12) vertices that carry a hull point along
        self.hull_neighbour_weights = data["hull_neighbour_weights"]  # (R * F, 12), sum 1
        self.hull_triangles = data["hull_triangles"]  # (., 3)
        # 1: turns with the head, 0: stays with the body; the neck lies between.
        self.head_share: Array = smoothstep(5.75, 6.75, self.mean[:, 1] + 0.35 * (self.mean[:, 2] - 0.4)).astype(f32)
        self.head_share[~self.is_skin] = 1
        self.noise_volume: Array = (np.random.default_rng(7).random((32, 32, 32)) * 2 - 1).astype(f32)
        self._find_landmarks()

    def _find_landmarks(self) -> None:
        lips = np.nonzero((self.lips > 0.3) & self.is_skin)[0]
        lip_x = self.mean[lips, 0]
        self.mouth_corners = (int(lips[lip_x.argmin()]), int(lips[lip_x.argmax()]))  # viewer's left, right
        x, y, z = self.mean.T
        ridge = np.nonzero(self.is_skin & (abs(x) < 0.05) & (y > 6.7) & (y < 7.2))[0]
        self.nose_tip = int(ridge[z[ridge].argmax()])
        face = self.is_skin & (z > 0.6) & (y > 6.05) & (y < 8.05) & (abs(x) < 0.75)
        self.face_vertices: Array = np.nonzero(face)[0]  # chin to hairline, without ears


def _tent(x: float) -> tuple[tuple[str, float], ...]:
    """Linear interpolation between the data's three steps of muscle and weight."""
    return ("min", max(0, 1 - 2 * x)), ("average", 1 - abs(2 * x - 1)), ("max", max(0, 2 * x - 1))


@lru_cache(maxsize=1)
def head_model() -> HeadModel:
    """The head data, loaded once per process (about 40 ms)."""
    with np.load(MODEL_PATH) as data:
        return HeadModel(dict(data))
