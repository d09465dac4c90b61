"""Beard, moustache, goatee, stubble: where they grow, and the thin shell that the longer ones are drawn as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.hair import BEARD
from lora_diffusion.world.people.head import SKIN, head_model
from lora_diffusion.world.people.maths import Array, f32, smoothstep
from lora_diffusion.world.people.raster import noise
from lora_diffusion.world.people.traits import Traits


@dataclass(frozen=True, eq=False)
class BeardMesh:
    """A shell over some of the head's vertices; lifted off the skin in each view, it follows the expression."""

    skin_vertices: Array  # (P,) the head's vertices under the shell
    triangles: Array  # (., 3) int32, indices into the shell's points
    thickness: Array  # (P,) float32, head units
    attributes: Array  # (P, 4): template x, template y, field (positive where hair is), kind

    def points(self, vertices: Array, normals: Array) -> Array:
        """The shell (P, 3) over the skin of this view; beards hang down and a little forward."""
        lift = self.thickness[:, None]
        hang = np.array([0, -0.25, 0.05], f32)
        return vertices[self.skin_vertices] + normals[self.skin_vertices] * lift + hang * lift


def beard_zones(template: Array) -> tuple[Array, Array, Array]:
    """Density 0..1 of (moustache, goatee, full beard) at template points (P, 3), for whoever lets all of it grow."""
    x, y, z = abs(template[:, 0]), template[:, 1], template[:, 2]
    moustache = smoothstep(0.28, 0.20, x) * smoothstep(6.70, 6.74, y + 0.25 * x) * smoothstep(6.85, 6.80, y + 0.10 * x)
    moustache = moustache * smoothstep(1.2, 1.35, z)
    goatee = smoothstep(0.24, 0.16, x) * smoothstep(6.52, 6.46, y) * smoothstep(0.9, 1.2, z)
    mouth_side = smoothstep(0.30, 0.26, x) * smoothstep(0.15, 0.20, x)
    goatee = np.maximum(goatee, mouth_side * smoothstep(6.72, 6.66, y) * smoothstep(1.1, 1.25, z) * 0.9)
    cheek_line = 6.46 + 0.50 * smoothstep(0.40, 0.70, x)
    full = smoothstep(cheek_line + 0.07, cheek_line - 0.05, y)
    full = full * smoothstep(0.48, 0.62, z - 0.25 * smoothstep(6.7, 6.4, y))  # not on the neck's back
    full = full * smoothstep(5.98, 6.12, y + 0.2 * (z - 0.9))
    full = full * (1 - smoothstep(0.24, 0.20, x) * smoothstep(6.50, 6.56, y))  # not on the chin's groove
    return moustache, goatee, full


def beard_density(traits: Traits, zones: tuple[Array, Array, Array]) -> Array:
    """What of the zones this person has grown, 0..1."""
    moustache, goatee, full = zones
    return np.maximum(np.maximum(moustache * traits.moustache, goatee * traits.goatee), full * traits.beard)


def build_beard(traits: Traits) -> BeardMesh | None:
    """The beard of a person; None for whoever has none, or only stubble (which is painted on the skin)."""
    head = head_model()
    template = head.mean
    density = beard_density(traits, beard_zones(template)) * head.is_skin
    density = density * (1 - smoothstep(0.2, 0.5, head.lips)) * (1 - smoothstep(0.2, 0.5, head.inside_mouth))
    if density.max() <= 0.1:
        return None
    triangles = head.triangles[head.triangle_materials == SKIN]
    triangles = triangles[(density[triangles] > 0.02).any(1)]
    used = np.unique(triangles)
    position = np.full(len(template), -1)
    position[used] = np.arange(len(used))

    lumps = noise((template[used] * 7 + traits.tex * 2).astype(f32), head.noise_volume)
    chin = smoothstep(6.6, 6.2, template[used, 1])
    full = 0.12 * traits.beard_len * traits.beard * (0.25 + 1.1 * chin)
    thickness = density[used] * (0.02 + full + 0.03 * traits.beard_len) * (1 + 0.35 * lumps)
    field = density[used] - 0.06
    return BeardMesh(
        skin_vertices=used,
        triangles=position[triangles].astype(np.int32),
        thickness=thickness.astype(f32),
        attributes=np.stack([template[used, 0], template[used, 1], field, np.full(len(used), BEARD)], 1).astype(f32),
    )
