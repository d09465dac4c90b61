"""Draws a photo: a person in a view. Camera, rasterising, shading, film; numpy and numba, no display.

Deterministic: the same person, view and size give the same bytes on one machine, and the same within a grey level or
two on another (other CPUs round differently).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.backgrounds import background
from lora_diffusion.world.people.body import Body
from lora_diffusion.world.people.hair import FLYAWAY
from lora_diffusion.world.people.head import GLASSES, LEFT_EYE, RIGHT_EYE, SKIN, TEETH, head_model
from lora_diffusion.world.people.maths import Array, dot, f32, normalise, rotation, smoothstep
from lora_diffusion.world.people.people import Person
from lora_diffusion.world.people.pose import Scene, pose_scene
from lora_diffusion.world.people.raster import rasterise, vertex_normals
from lora_diffusion.world.people.shading import (
    Light,
    StrandSurface,
    Surface,
    eye_colours,
    gaze_direction,
    set_up_light,
    shade_strands,
    shade_surface,
    strand_coordinates,
)
from lora_diffusion.world.people.skin import SkinPixels, paint_skin
from lora_diffusion.world.people.views import View

CAMERA_DISTANCE = f32(13.0)  # head units: about 1.3 m
FRAME_HEIGHT = 2.95  # head units that the picture covers at zoom 1
TARGET_LUMINANCE = 0.34  # of the skin's brighter parts; the camera's exposure goes part of the way there


@dataclass(frozen=True, eq=False)
class Rendering:
    """A photo and where the face is in it.

    Coordinates are pixels from the top left corner, so that the centre of the first pixel is (0.5, 0.5). They may lie
    outside the picture, and do not care whether hair hides the spot.
    """

    image: Array  # (size, size, 3) uint8, RGB
    landmarks: Array  # (5, 2) float32 x, y in ArcFace's order: left eye, right eye (viewer's), nose tip, mouth corners
    face_box: Array  # (4,) float32 x0, y0, x1, y1: chin to hairline, without ears


def render(person: Person, view: View, size: int = 64) -> Rendering:
    """Draws ``person`` in ``view``, ``size`` x ``size`` pixels (an even number, from 16).

    ImportError without numba (the extra ``faces``). About 30 pictures a second on one core at 64 px; the very first
    call compiles for some seconds.
    """
    if size < 16 or size % 2:
        raise ValueError(f"size={size}: expected an even number of pixels from 16 up, for example 64")
    scale = 3 if size <= 80 else 2  # samples per pixel and direction
    samples = size * scale
    body = person.body
    scene = pose_scene(body, view)
    camera = _Camera(view, scene.centre, samples)
    solid = _Layer(camera, scene.points, scene.triangles)
    solid.draw()
    strands = _Layer(camera, scene.strand_points, scene.strand_triangles) if len(scene.strand_points) else None
    casters = [(solid.positions, solid.triangles)]
    if strands is not None:
        strands.draw_strands(*strand_coordinates(body, scene.strand_attributes), scene.strand_attributes, solid.depth)
        dense = (scene.strand_attributes[:, 2][strands.triangles] > 0.04).all(1)
        casters.append((strands.positions, strands.triangles[dense]))

    backdrop = background(view.background, view.bg_seed, samples // 2)
    light = set_up_light(view, backdrop, casters)
    image = np.repeat(np.repeat(backdrop, 2, 0), 2, 1).astype(f32)
    luminance = _shade_solid(image, solid, scene, camera, body, view, light)
    if strands is not None:
        _shade_strands(image, strands, scene, camera, body, light)
    landmarks, face_box = _find_face(camera, scene.points, scale)
    return Rendering(_develop(image, view, luminance, size, scale), landmarks, face_box)


class _Camera:
    def __init__(self, view: View, centre: Array, samples: int) -> None:
        self.turn = rotation(view.cam_yaw, 0, 0)
        self.centre = centre
        self.samples = samples
        self.shift = view.shift
        self.focal_length = f32(13.0 / (FRAME_HEIGHT / view.zoom) * samples)  # samples per head unit, times distance

    def look(self, points: Array) -> Array:
        """World to camera coordinates (P, 3): x right, y up, z towards the camera."""
        return (points - self.centre) @ self.turn.T

    def project(self, seen: Array) -> Array:
        """Camera coordinates to x, y in samples and 1 / distance; (P, 3) float32."""
        distance = CAMERA_DISTANCE - seen[:, 2]
        middle, shift = self.samples / 2, self.shift
        x = middle + self.focal_length * seen[:, 0] / distance + shift[0] * self.samples
        y = middle - self.focal_length * seen[:, 1] / distance + shift[1] * self.samples
        return np.stack([x, y, 1 / distance], 1).astype(f32)


class _Layer:
    """A mesh seen by the camera, and which of its triangles is in front at each sample."""

    def __init__(self, camera: _Camera, points: Array, triangles: Array) -> None:
        self.triangles = triangles
        self.positions = camera.look(points)  # (P, 3) camera coordinates
        self.screen = camera.project(self.positions)
        normals = np.empty_like(points)
        vertex_normals(points, triangles, normals)
        self.normals = normals @ camera.turn.T
        shape = (camera.samples, camera.samples)
        self.depth = np.zeros(shape, f32)
        self._owner = np.full(shape, -1, np.int32)
        self._weight0, self._weight1 = np.zeros(shape, f32), np.zeros(shape, f32)

    def draw(self) -> None:
        rasterise(self.screen, self.triangles, self.depth, self._owner, self._weight0, self._weight1)
        self._collect()

    def draw_strands(self, coordinates: Array, frayed: Array, attributes: Array, behind: Array) -> None:
        """Draws where the layer is in front of the depths ``behind``."""
        self.depth[:] = behind
        field, volume = attributes[:, 2].copy(), head_model().noise_volume
        target = (self.depth, self._owner, self._weight0, self._weight1)
        rasterise(self.screen, self.triangles, *target, field, coordinates, frayed, volume)
        self._collect()

    def _collect(self) -> None:
        self.covered = self._owner >= 0  # (S, S); the C samples of the layer, row by row
        self.seen = self._owner[self.covered]  # (C,) triangle
        self.corners = self.triangles[self.seen]  # (C, 3)
        w0, w1 = self._weight0[self.covered], self._weight1[self.covered]
        self.weights = np.stack([w0, w1, 1 - w0 - w1], 1)  # (C, 3)

    def interpolate(self, values: Array) -> Array:
        """Values at the points (P, k) -> values at the covered samples (C, k)."""
        corners, weights = self.corners, self.weights
        return (
            values[corners[:, 0]] * weights[:, :1]
            + values[corners[:, 1]] * weights[:, 1:2]
            + values[corners[:, 2]] * weights[:, 2:]
        )


def _shade_solid(
    image: Array, layer: _Layer, scene: Scene, camera: _Camera, body: Body, view: View, light: Light
) -> float:
    """Paints head, eyes, cloth and glasses into ``image``; returns the luminance of the skin's brighter parts."""
    head = head_model()
    glasses = len(scene.points) - len(head.mean)  # their points, appended to the head's
    columns = [
        layer.normals,
        layer.positions,
        np.concatenate([head.mean, np.zeros((glasses, 3), f32)]),
        np.concatenate([body.colours, np.tile(body.glasses.colour, (glasses, 1))]),
        np.concatenate([head.ambient_occlusion, np.ones(glasses, f32)])[:, None],
        np.concatenate([head.lips, np.zeros(glasses, f32)])[:, None],
    ]
    values = layer.interpolate(np.concatenate(columns, 1).astype(f32))
    normals, positions, template = normalise(values[:, :3]), values[:, 3:6], values[:, 6:9]
    openness, lips = values[:, 12], values[:, 13]
    material = scene.materials[layer.seen]
    is_skin = material == SKIN
    to_camera = normalise(np.array([0, 0, CAMERA_DISTANCE], f32) - positions)
    backward = dot(normals, to_camera) < 0
    normals[backward & ~is_skin] *= -1
    surface = Surface(
        colour=values[:, 9:12].copy(),
        normals=normals,
        to_camera=to_camera,
        positions=positions,
        openness=openness,
        gloss=np.full(len(material), 0.22, f32),
        sharpness=np.full(len(material), 18.0, f32),
        is_skin=is_skin.astype(f32),
    )

    skin = SkinPixels(
        template[is_skin],
        lips[is_skin],
        surface.colour[is_skin],
        normals[is_skin],
        surface.gloss[is_skin],
        surface.sharpness[is_skin],
    )
    paint_skin(skin, body, view, _stubble(body, view))
    surface.colour[is_skin], surface.normals[is_skin] = skin.colour, skin.normals
    surface.gloss[is_skin], surface.sharpness[is_skin] = skin.gloss, skin.sharpness

    to_head = camera.turn @ scene.head_turn
    for eye, vertices, convergence in ((LEFT_EYE, head.left_eye, -2.0), (RIGHT_EYE, head.right_eye, 2.0)):
        here = material == eye
        if not here.any():
            continue
        centre = layer.positions[: len(head.mean)][vertices].mean(0)
        outwards = normalise(positions[here] - centre)
        surface.colour[here] = eye_colours(body, outwards, gaze_direction(view, to_head, convergence))
        surface.normals[here] = outwards
        surface.gloss[here], surface.sharpness[here] = 1.0, 160
        openness[here] = np.clip(openness[here] * 1.25 + 0.25, 0, 0.95)
    surface.gloss[material == GLASSES], surface.sharpness[material == GLASSES] = 0.6, 40
    surface.gloss[material == TEETH] = 0.3

    colour = shade_surface(surface, light)
    image[layer.covered] = colour
    if not is_skin.any():
        return 0.3
    return float(np.percentile(colour[is_skin] @ np.array([0.25, 0.6, 0.15], f32), 70))


def _stubble(body: Body, view: View) -> float:
    """The person's own, or the view's where a man is unshaven."""
    unshaven = view.stubble * float(smoothstep(0.5, 0.8, body.traits.gender)) * (view.accessory == "unshaven")
    return max(body.traits.stubble, unshaven)


def _shade_strands(image: Array, layer: _Layer, scene: Scene, camera: _Camera, body: Body, light: Light) -> None:
    """Blends hair and beard into ``image``."""
    if not len(layer.seen):
        return
    values = layer.interpolate(np.concatenate([layer.normals, layer.positions, scene.strand_attributes], 1))
    normals, positions, attributes = normalise(values[:, :3]), values[:, 3:6], values[:, 6:10]
    kind = attributes[:, 3]
    # The angle phi jumps from pi to -pi at the back of the head: triangles across the seam interpolate it unwrapped.
    phi = scene.strand_attributes[layer.corners, 0]
    across = (np.ptp(phi, axis=1) > 3) & ((kind < 0.5) | (kind > FLYAWAY - 0.5))
    if across.any():
        unwrapped = np.where(phi[across] < 0, phi[across] + 2 * np.pi, phi[across])
        attributes[across, 0] = dot(unwrapped, layer.weights[across])
    to_camera = normalise(np.array([0, 0, CAMERA_DISTANCE], f32) - positions)
    from_inside = dot(normals, to_camera) < 0
    normals[from_inside] *= -1
    head_up = camera.turn @ scene.head_turn @ np.array([0, 1, 0], f32)
    surface = StrandSurface(normals, positions, to_camera, attributes, from_inside)
    colour, opacity = shade_strands(body, surface, light, head_up)
    image[layer.covered] = image[layer.covered] * (1 - opacity[:, None]) + colour * opacity[:, None]


def _find_face(camera: _Camera, points: Array, scale: int) -> tuple[Array, Array]:
    """Landmarks (5, 2) and box (4,) of the face in pixels; ``points``: the scene's, of which the head's come first."""
    head = head_model()
    eyes = [points[: len(head.mean)][eye].mean(0) for eye in (head.right_eye, head.left_eye)]
    marks = np.stack([*eyes, points[head.nose_tip], *points[list(head.mouth_corners)]])
    landmarks = camera.project(camera.look(marks))[:, :2] / scale
    outline = camera.project(camera.look(points[head.face_vertices]))[:, :2] / scale
    return landmarks, np.concatenate([outline.min(0), outline.max(0)])


def _develop(image: Array, view: View, luminance: float, size: int, scale: int) -> Array:
    """Film: exposure, white balance, mean over samples, tone curve, grain; linear -> (size, size, 3) uint8."""
    gain = (TARGET_LUMINANCE / max(luminance, 0.02)) ** 0.45
    image *= view.exposure * f32(gain) * np.array([1 + view.warm, 1, 1 - view.warm], f32)
    image = image.reshape(size, scale, size, scale, 3).mean((1, 3))
    image = image * (1 + image * 0.06) / (1 + image * 0.22)
    image = np.clip(image, 0, 1) ** f32(1 / 2.2)
    grain = np.random.default_rng(view.seed).standard_normal(image.shape).astype(f32)
    image += grain * f32(view.noise)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
