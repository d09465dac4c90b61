"""From a body at rest to the scene of one view: expression, clothes, turned head, glasses on or off, hair in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.accessories import cloth_mask
from lora_diffusion.world.people.body import Body
from lora_diffusion.world.people.head import GLASSES, head_model
from lora_diffusion.world.people.maths import Array, f32, rotation
from lora_diffusion.world.people.raster import vertex_normals
from lora_diffusion.world.people.traits import Traits
from lora_diffusion.world.people.views import EXPRESSIONS, View

NECK_PIVOT = np.array([0, 6.25, 0.35], f32)  # the head turns about this point
FRAMED_POINT = np.array([0, 7.28, 0.55], f32)  # what the camera looks at: between the eyes, inside the head


@dataclass(frozen=True, eq=False)
class Scene:
    """Meshes in world coordinates. The solid mesh is the head's, followed by the glasses where they are worn."""

    points: Array  # (P, 3) float32
    triangles: Array  # (T, 3) int32
    materials: Array  # (T,) uint8
    strand_points: Array  # (Q, 3): hair, then beard; Q may be 0
    strand_triangles: Array  # (., 3)
    strand_attributes: Array  # (Q, 4) as in HairMesh
    head_turn: Array  # (3, 3) rotation of the head
    centre: Array  # (3,) middle of the picture


def pose_scene(body: Body, view: View) -> Scene:
    head = head_model()
    vertices = _express(body, view)
    normals = np.empty_like(vertices)
    vertex_normals(vertices, head.triangles, normals)
    clothed = cloth_mask(head.mean, view.neck) * head.is_skin

    head_turn = rotation(view.yaw, view.pitch, view.roll)
    body_turn = rotation(view.yaw * 0.35, 0, 0)  # the shoulders follow a little

    def turn(points: Array, head_share: Array) -> Array:
        q = points - NECK_PIVOT
        share = head_share[:, None]
        turned: Array = (q @ head_turn.T) * share + (q @ body_turn.T) * (1 - share) + NECK_PIVOT
        return turned

    points = [turn(vertices + normals * (0.05 * clothed)[:, None], head.head_share)]  # cloth is 5 mm thick
    triangles, materials = [head.triangles], [head.triangle_materials]
    if wears_glasses(body.traits, view):
        glasses = body.glasses
        triangles.append(glasses.triangles + len(points[0]))
        points.append(turn(glasses.points, np.ones(len(glasses.points), f32)))
        materials.append(np.full(len(glasses.triangles), GLASSES, np.uint8))

    strand_points, strand_triangles = [np.zeros((0, 3), f32)], [np.zeros((0, 3), np.int32)]
    strand_attributes = [np.zeros((0, 4), f32)]
    if body.hair is not None:
        strand_points.append(turn(body.hair.points, body.hair.head_share))
        strand_triangles.append(body.hair.triangles)
        strand_attributes.append(body.hair.attributes)
    if body.beard is not None:
        strand_triangles.append(body.beard.triangles + sum(map(len, strand_points)))
        strand_points.append(turn(body.beard.points(vertices, normals), head.head_share[body.beard.skin_vertices]))
        strand_attributes.append(body.beard.attributes)

    mostly_head = head_turn.T * 0.8 + body_turn.T * 0.2
    centre = ((FRAMED_POINT - NECK_PIVOT) @ mostly_head + NECK_PIVOT).astype(f32) + np.array([0, -0.07, 0], f32)
    return Scene(
        points=np.concatenate(points).astype(f32),
        triangles=np.concatenate(triangles).astype(np.int32),
        materials=np.concatenate(materials),
        strand_points=np.concatenate(strand_points).astype(f32),
        strand_triangles=np.concatenate(strand_triangles).astype(np.int32),
        strand_attributes=np.concatenate(strand_attributes),
        head_turn=head_turn,
        centre=centre,
    )


def wears_glasses(traits: Traits, view: View) -> bool:
    """Whether glasses are in the picture: the person's habit, unless the view toggles it."""
    return traits.glasses != (view.accessory == "toggle glasses")


def _express(body: Body, view: View) -> Array:
    """The head's vertices (V, 3) with the view's expression, not yet turned."""
    head = head_model()
    vertices = body.vertices.copy()
    for unit, amount in EXPRESSIONS[view.expression].items():
        amount = amount if unit == "eyeBlink" else amount * view.intensity  # eyes are closed or they are not
        for side in ("",) if f"fac:{unit}" in head.targets else ("Left", "Right"):
            head.add_target(vertices, f"fac:{unit}{side}", amount)
    if view.gaze[1] < -3:  # the lids follow eyes that look down
        for side in ("Left", "Right"):
            head.add_target(vertices, f"fac:eyeLookDown{side}", min(0.8, -view.gaze[1] / 25))
    return vertices
