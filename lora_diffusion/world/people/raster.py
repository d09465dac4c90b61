"""The loops that numpy cannot do: rasterising triangles, normals, noise, shadows. Compiled by numba on first use.

Everything else of the renderer is plain numpy, so whoever only wants names, latents or captions needs no numba.
Screen space: x to the right and y downwards in pixels, pixel centres at +0.5; the third coordinate grows towards the
camera. Triangles are drawn from both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from lora_diffusion.world.people.maths import Array

try:
    from numba import njit
except ImportError:  # the extra "world" is not installed
    njit = None

Kernel = Callable[..., Any]


def compiled(kernel: Kernel) -> Kernel:
    """Compiles on the first call and keeps the machine code beside this file, or in the user's cache folder."""
    if njit is None:

        def refuse(*_: Any) -> None:
            raise ImportError("drawing synthetic people needs numba: pip install 'lora-diffusion[world]'")

        return refuse
    options = {"fastmath": True, "nogil": True}
    try:
        return cast(Kernel, njit(cache=True, **options)(kernel))
    except RuntimeError:  # neither folder can be written: each process compiles for itself
        return cast(Kernel, njit(**options)(kernel))


@compiled
def vertex_normals(vertices: Array, triangles: Array, normals: Array) -> None:
    """Fills ``normals`` (V, 3) with unit normals, the area-weighted mean of the triangles round each vertex."""
    normals[:] = 0
    for t in range(triangles.shape[0]):
        i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ax = vertices[j, 0] - vertices[i, 0]
        ay = vertices[j, 1] - vertices[i, 1]
        az = vertices[j, 2] - vertices[i, 2]
        bx = vertices[k, 0] - vertices[i, 0]
        by = vertices[k, 1] - vertices[i, 1]
        bz = vertices[k, 2] - vertices[i, 2]
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for q in (i, j, k):
            normals[q, 0] += nx
            normals[q, 1] += ny
            normals[q, 2] += nz
    for q in range(normals.shape[0]):
        length = (normals[q, 0] ** 2 + normals[q, 1] ** 2 + normals[q, 2] ** 2) ** 0.5 + 1e-12
        normals[q, 0] /= length
        normals[q, 1] /= length
        normals[q, 2] /= length


@compiled
def _noise_at(x: float, y: float, z: float, volume: Array) -> float:
    """Smoothly interpolated value of a periodic noise volume (n, n, n)."""
    n = volume.shape[0]
    ix, iy, iz = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    fx, fy, fz = x - ix, y - iy, z - iz
    fx = fx * fx * (3 - 2 * fx)
    fy = fy * fy * (3 - 2 * fy)
    fz = fz * fz * (3 - 2 * fz)
    x0, y0, z0 = ix % n, iy % n, iz % n
    x1, y1, z1 = (ix + 1) % n, (iy + 1) % n, (iz + 1) % n
    a = volume[x0, y0, z0] * (1 - fx) + volume[x1, y0, z0] * fx
    b = volume[x0, y1, z0] * (1 - fx) + volume[x1, y1, z0] * fx
    c = volume[x0, y0, z1] * (1 - fx) + volume[x1, y0, z1] * fx
    d = volume[x0, y1, z1] * (1 - fx) + volume[x1, y1, z1] * fx
    return (a * (1 - fy) + b * fy) * (1 - fz) + (c * (1 - fy) + d * fy) * fz


@compiled
def _noise_many(points: Array, volume: Array, out: Array) -> None:
    for q in range(points.shape[0]):
        out[q] = _noise_at(points[q, 0], points[q, 1], points[q, 2], volume)


def noise(points: Array, volume: Array) -> Array:
    """Noise in -1..1 at points (P, 3), one cell of the volume per unit; (P,) float32."""
    points = np.ascontiguousarray(points, np.float32)
    out = np.empty(len(points), np.float32)
    _noise_many(points, volume, out)
    return out


@compiled
def rasterise(
    points: Array,
    triangles: Array,
    depth: Array,
    owner: Array | None = None,
    weight0: Array | None = None,
    weight1: Array | None = None,
    field: Array | None = None,
    strands: Array | None = None,
    jaggedness: Array | None = None,
    volume: Array | None = None,
) -> None:
    """Draws triangles into a depth buffer (height, width), where they are nearer than what is there.

    ``points`` (V, 3): screen x, y and what ``depth`` holds: 1 / distance, which makes the weights perspective-correct, or any
    depth that is linear in the screen. With ``owner``, the triangle's index and the weights of its first two corners are
    written, too.

    For hair, only pixels whose interpolated ``field`` plus noise is positive are kept. ``field`` (V,): positive where hair
    grows; within ``jaggedness`` (V,) of zero, noise of ``volume`` at the coordinates ``strands`` (V, 3) decides, so the hair
    ends in strands instead of along mesh edges.
    """
    height, width = depth.shape
    for t in range(triangles.shape[0]):
        i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0, w0 = points[i, 0], points[i, 1], points[i, 2]
        x1, y1, w1 = points[j, 0], points[j, 1], points[j, 2]
        x2, y2, w2 = points[k, 0], points[k, 1], points[k, 2]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        left = max(0, int(np.ceil(min(x0, x1, x2) - 0.5)))
        right = min(width - 1, int(np.floor(max(x0, x1, x2) - 0.5)))
        top = max(0, int(np.ceil(min(y0, y1, y2) - 0.5)))
        bottom = min(height - 1, int(np.floor(max(y0, y1, y2) - 0.5)))
        inverse = 1.0 / area
        for y in range(top, bottom + 1):
            py = y + 0.5
            for x in range(left, right + 1):
                px = x + 0.5
                l0 = ((x1 - px) * (y2 - py) - (x2 - px) * (y1 - py)) * inverse
                l1 = ((x2 - px) * (y0 - py) - (x0 - px) * (y2 - py)) * inverse
                l2 = 1.0 - l0 - l1
                if l0 < 0 or l1 < 0 or l2 < 0:
                    continue
                w = l0 * w0 + l1 * w1 + l2 * w2
                if w <= depth[y, x]:
                    continue
                if field is not None:
                    f = l0 * field[i] + l1 * field[j] + l2 * field[k]
                    jag = jaggedness[i]  # type: ignore[index]
                    if f < jag:
                        if f < -jag:
                            continue
                        qx = l0 * strands[i, 0] + l1 * strands[j, 0] + l2 * strands[k, 0]  # type: ignore[index]
                        qy = l0 * strands[i, 1] + l1 * strands[j, 1] + l2 * strands[k, 1]  # type: ignore[index]
                        qz = l0 * strands[i, 2] + l1 * strands[j, 2] + l2 * strands[k, 2]  # type: ignore[index]
                        f += jag * _noise_at(qx, qy, qz, volume)
                        if f < 0:
                            continue
                depth[y, x] = w
                if owner is not None:
                    owner[y, x] = t
                    weight0[y, x] = l0 * w0 / w  # type: ignore[index]
                    weight1[y, x] = l1 * w1 / w  # type: ignore[index]


@compiled
def _lit_fraction(points: Array, depth: Array, bias: float, radius: float, out: Array) -> None:
    size = depth.shape[0]
    for q in range(points.shape[0]):
        lit = 0.0
        for k in range(9):
            x = points[q, 0] + (k % 3 - 1) * radius - 0.5
            y = points[q, 1] + (k // 3 - 1) * radius - 0.5
            ix, iy = int(np.floor(x)), int(np.floor(y))
            fx, fy = x - ix, y - iy
            for u in range(4):
                xi = min(max(ix + u % 2, 0), size - 1)
                yi = min(max(iy + u // 2, 0), size - 1)
                share = (fx if u % 2 else 1 - fx) * (fy if u // 2 else 1 - fy)
                if points[q, 2] > depth[yi, xi] - bias:
                    lit += share
        out[q] = lit / 9.0


def lit_fraction(points: Array, depth: Array, bias: float, radius: float) -> Array:
    """How much of the light reaches points (P, 3), given in the coordinates of the square shadow map ``depth``; 0..1.

    Percentage-closer filtering: 3 x 3 taps ``radius`` texels apart; ``bias`` in depth units keeps surfaces from
    shadowing themselves.
    """
    out = np.empty(len(points), np.float32)
    _lit_fraction(np.ascontiguousarray(points, np.float32), depth, np.float32(bias), np.float32(radius), out)
    return out
