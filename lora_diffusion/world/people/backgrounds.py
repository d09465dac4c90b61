"""Backgrounds: sixteen places, cheaply painted, out of focus as behind a portrait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_diffusion.world.people.maths import Array, f32, linear_rgb, smoothstep
from lora_diffusion.world.people.views import Colour

STUDIOS: Mapping[str, Colour] = {"white": (0.93, 0.93, 0.93), "grey": (0.55, 0.55, 0.57), "dark": (0.14, 0.14, 0.16)}
WALLS: Mapping[str, Colour] = {
    "blue": (0.30, 0.48, 0.72),
    "red": (0.66, 0.22, 0.20),
    "yellow": (0.88, 0.76, 0.38),
    "green": (0.36, 0.58, 0.40),
}


class _Canvas:
    """A square of n x n pixels to paint on; x and y run from 0 to 1, colours are given for the display."""

    def __init__(self, seed: int, n: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.n = n
        self.y, self.x = np.mgrid[0:n, 0:n].astype(f32) / n
        # vignette: squared distance from a random centre
        self.vignette = (self.x - self.rng.uniform(0.3, 0.7)) ** 2 + (self.y - self.rng.uniform(0.2, 0.6)) ** 2

    def gradient(self, start: Sequence[float] | Array, end: Sequence[float] | Array, t: Array) -> Array:
        a, b = linear_rgb(start), linear_rgb(end)
        return a + (b - a) * t[..., None]

    def jittered(self, colour: Sequence[float], spread: float = 0.05) -> Array:
        return np.clip(np.array(colour) + self.rng.normal(0, spread, 3), 0, 1)

    def blobs(
        self,
        image: Array,
        count: int,
        colours: Sequence[Colour],
        radii: tuple[float, float],
        rows: tuple[float, float] = (0.0, 1.0),
        soft: float = 0.35,
        opacity: float = 0.8,
    ) -> Array:
        """Scatters blurred discs with centres in ``rows`` (a range of y)."""
        for _ in range(count):
            colour = linear_rgb(colours[int(self.rng.integers(len(colours)))])
            x, y = self.rng.random(), self.rng.uniform(*rows)
            radius = self.rng.uniform(*radii)
            distance = np.sqrt((self.x - x) ** 2 + (self.y - y) ** 2)
            image = over(image, opacity * smoothstep(radius, radius * (1 - soft), distance), colour)
        return image


def over(image: Array, opacity: Array, colour: Array) -> Array:
    opacity = opacity[..., None]
    return image * (1 - opacity) + colour * opacity


def background(name: str, seed: int, n: int) -> Array:
    """The place ``name`` (one of views.BACKGROUNDS) as (n, n, 3) linear rgb; the same seed stands in the same spot."""
    canvas = _Canvas(seed, n)
    kind = name.split()[0]
    if name.endswith("studio"):
        colour = STUDIOS[kind]
        light = canvas.jittered(colour, 0.015)
        return canvas.gradient(light, np.array(colour) * 0.62, np.clip(canvas.vignette * 1.6, 0, 1))
    if name in PLACES:
        return PLACES[name](canvas)
    wall = canvas.jittered(WALLS[kind], 0.04)
    return canvas.gradient(wall, wall * 0.65, np.clip(canvas.vignette * 1.3 + 0.15 * (canvas.y - 0.5), 0, 1))


def _brick_wall(c: _Canvas) -> Array:
    image = c.gradient(c.jittered((0.58, 0.30, 0.22)), (0.48, 0.24, 0.18), c.y)
    length = c.n / c.rng.uniform(7, 10)  # of a brick, pixels
    row = np.floor(c.y * c.n / (length * 0.5))
    along = ((c.x * c.n + (row % 2) * length * 0.5) % length) / length
    up = (c.y * c.n % (length * 0.5)) / (length * 0.5)
    joint = np.maximum(
        smoothstep(0.12, 0.02, np.minimum(along, 1 - along)), smoothstep(0.2, 0.04, np.minimum(up, 1 - up))
    )
    return over(image, joint * 0.7, linear_rgb((0.72, 0.66, 0.60)))


def _garden(c: _Canvas) -> Array:
    leaves = [(0.35, 0.60, 0.25), (0.20, 0.42, 0.16), (0.62, 0.78, 0.42), (0.85, 0.50, 0.60), (0.92, 0.85, 0.45)]
    return c.blobs(c.gradient((0.60, 0.74, 0.50), (0.25, 0.45, 0.18), c.y), 26, leaves, (0.03, 0.13))


def _forest(c: _Canvas) -> Array:
    leaves = [(0.20, 0.32, 0.14), (0.12, 0.20, 0.09), (0.45, 0.58, 0.30), (0.70, 0.76, 0.52)]
    image = c.blobs(c.gradient((0.42, 0.52, 0.36), (0.14, 0.20, 0.10), c.y), 18, leaves, (0.03, 0.12))
    for _ in range(5):
        x, width = c.rng.random(), c.rng.uniform(0.02, 0.05)
        trunk = smoothstep(width, width * 0.5, abs(c.x - x))[..., None]
        image = image * (1 - 0.8 * trunk) + linear_rgb((0.22, 0.15, 0.10)) * 0.8 * trunk
    return image


def _beach(c: _Canvas) -> Array:
    horizon, shore = c.rng.uniform(0.45, 0.6), c.rng.uniform(0.68, 0.8)
    sky = c.gradient((0.55, 0.75, 0.95), (0.82, 0.90, 0.96), np.clip(c.y / horizon, 0, 1))
    image = over(sky, smoothstep(horizon - 0.01, horizon + 0.01, c.y), linear_rgb((0.16, 0.48, 0.62)))
    return over(image, smoothstep(shore - 0.03, shore + 0.03, c.y), linear_rgb((0.86, 0.76, 0.58)))


def _city_street(c: _Canvas) -> Array:
    houses = [(0.55, 0.50, 0.46), (0.40, 0.42, 0.46), (0.62, 0.58, 0.50), (0.50, 0.34, 0.28)]
    image = c.gradient((0.70, 0.76, 0.82), (0.42, 0.42, 0.44), c.y)
    for _ in range(7):
        x, width, top = c.rng.random(), c.rng.uniform(0.06, 0.18), c.rng.uniform(0, 0.45)
        colour = c.jittered(houses[c.rng.integers(4)])
        house = smoothstep(width, width * 0.85, abs(c.x - x)) * smoothstep(top - 0.02, top + 0.02, c.y)
        image = over(image, house, linear_rgb(colour))
    return c.blobs(image, 10, [(0.9, 0.85, 0.6), (0.8, 0.3, 0.2), (0.25, 0.25, 0.28)], (0.015, 0.05), (0.4, 0.95))


def _sunset_sky(c: _Canvas) -> Array:
    image = c.gradient((0.30, 0.32, 0.58), (0.98, 0.58, 0.30), c.y**1.2)
    return c.blobs(image, 6, [(0.98, 0.72, 0.45), (0.80, 0.45, 0.48)], (0.1, 0.25), (0.3, 0.9), soft=0.9, opacity=0.5)


def _office(c: _Canvas) -> Array:
    image = c.gradient((0.80, 0.80, 0.78), (0.62, 0.60, 0.56), c.y)
    left = c.rng.uniform(0.05, 0.6)
    window = smoothstep(left, left + 0.02, c.x) * smoothstep(left + 0.37, left + 0.35, c.x)
    window = window * smoothstep(0.08, 0.1, c.y) * smoothstep(0.52, 0.5, c.y)
    image = over(image, window, linear_rgb((0.88, 0.94, 1.0)))
    return c.blobs(
        image, 6, [(0.30, 0.30, 0.33), (0.45, 0.33, 0.22), (0.25, 0.40, 0.55)], (0.05, 0.12), (0.6, 1), soft=0.3
    )


def _library(c: _Canvas) -> Array:
    wood = c.gradient((0.34, 0.22, 0.14), (0.22, 0.14, 0.09), c.y)
    shelves, offset = c.rng.integers(3, 5), c.rng.random()
    book = np.floor(c.x * c.rng.uniform(14, 20))
    shelf = np.floor(c.y * shelves + offset)
    scrambled = np.sin(book * 12.9898 + shelf * 78.233 + c.seed % 97) * 43758.5453
    scrambled = scrambled - np.floor(scrambled)
    spines = [
        *((0.55, 0.15, 0.14), (0.16, 0.28, 0.45), (0.72, 0.62, 0.42)),
        *((0.18, 0.36, 0.24), (0.30, 0.18, 0.12), (0.78, 0.74, 0.66)),
    ]
    colours = linear_rgb(np.array(spines))[(scrambled * 6).astype(int) % 6]
    is_book = (((c.y * shelves + offset) % 1) > 0.15)[..., None]
    return np.where(is_book, 0.75 * colours, wood).astype(f32)


def _night_lights(c: _Canvas) -> Array:
    lamps = [(1, 0.80, 0.45), (0.95, 0.35, 0.25), (0.40, 0.65, 1), (0.95, 0.95, 0.85), (0.4, 0.9, 0.6)]
    image = c.gradient((0.05, 0.06, 0.12), (0.09, 0.07, 0.10), c.y)
    return c.blobs(image, 22, lamps, (0.02, 0.07), soft=0.25, opacity=0.75)


PLACES: Mapping[str, Callable[[_Canvas], Array]] = {
    "brick wall": _brick_wall,
    "garden": _garden,
    "forest": _forest,
    "beach": _beach,
    "city street": _city_street,
    "sunset sky": _sunset_sky,
    "office": _office,
    "library": _library,
    "night lights": _night_lights,
}
