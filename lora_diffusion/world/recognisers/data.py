"""Pictures that the recognisers and the detector are trained and measured on, rendered once and kept as shards.

A shard holds the photos of 100 people: `im` (100, V, 64, 64, 3) uint8, `kps` (100, V, 5, 2) and `box` (100, V, 4) in px.
Folder `as-usual/` has people as they are; `other-hair/` has the same people, every view with all hair latents drawn anew,
so that training and measurement can tell a face from its hair. Axes: P people, V views.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.world.people import Person, render, sample_person, sample_view
from lora_diffusion.world.people.people import SEED
from lora_diffusion.world.people.traits import decode
from lora_diffusion.world.recognisers.composites import Labelled

SHARD = 100
HAIR_LATENTS = (
    "hair_mel", "hair_red", "hair_grey", "hair_len", "hair_vol", "hair_curl", "hairline", "temple", "part", "fringe",
    "side_thick", "bun", "balding", "quiff",
)  # fmt: skip


def with_other_hair(person: Person, index: int) -> Person:
    """The same face with hair number `index`: other colour (brows too), length, cut and curl."""
    rng = np.random.default_rng([SEED, person.number, 200 + index])
    drawn = rng.standard_normal(len(HAIR_LATENTS)).astype(np.float32)
    latents = dict(person.latents) | {name: float(x) for name, x in zip(HAIR_LATENTS, drawn, strict=True)}
    return Person(person.number, latents, decode(latents))


@dataclass(frozen=True)
class ShardSpec:
    """People `first` .. `first` + `count` - 1, `views` photos of each."""

    folder: str
    first: int
    count: int
    views: int
    other_hair: bool = False

    @property
    def path(self) -> Path:
        kind = "other-hair" if self.other_hair else "as-usual"
        return Path(self.folder) / kind / f"{self.first:06d}.npz"


def render_shard(spec: ShardSpec, size: int = 64) -> Path:
    """Renders one shard, whole or not at all; an existing one is left as it is."""
    if spec.path.exists():
        return spec.path
    shape = (spec.count, spec.views)
    photos = np.zeros((*shape, size, size, 3), np.uint8)
    points, boxes = np.zeros((*shape, 5, 2), np.float32), np.zeros((*shape, 4), np.float32)
    for i in range(spec.count):
        usual = sample_person(spec.first + i)
        for j in range(spec.views):
            person = with_other_hair(usual, j) if spec.other_hair else usual
            drawn = render(person, sample_view(person.number, 100 + j if spec.other_hair else j), size)
            photos[i, j], points[i, j], boxes[i, j] = drawn.image, drawn.landmarks, drawn.face_box
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    partial = spec.path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, im=photos, kps=points, box=boxes)
    os.replace(partial, spec.path)
    return spec.path


def render_people(folder: str, people: range, views: int, hair_views: int = 0, workers: int = 1) -> None:
    """Renders all shards of `people` that `folder` does not hold yet, `workers` processes at a time."""
    specs = []
    for first in range(people.start, people.stop, SHARD):
        count = min(SHARD, people.stop - first)
        specs.append(ShardSpec(folder, first, count, views))
        if hair_views:
            specs.append(ShardSpec(folder, first, count, hair_views, other_hair=True))
    missing = [spec for spec in specs if not spec.path.exists()]
    if workers <= 1 or len(missing) <= 1:
        for spec in missing:
            render_shard(spec)
        return
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(render_shard, missing))


@dataclass(frozen=True)
class Photos:
    """photos (N, 64, 64, 3), points (N, 5, 2), boxes (N, 4), person (N,) counted from 0 in the order of their numbers."""

    photos: NDArray[np.uint8]
    points: NDArray[np.float32]
    boxes: NDArray[np.float32]
    person: NDArray[np.int64]

    def labelled(self) -> Labelled:
        return Labelled(self.photos, self.points, self.boxes)


def load_people(folder: str, people: range, kinds: Sequence[str] = ("as-usual",)) -> Photos:
    """All photos of `people` in the shards of `folder`. FileNotFoundError where a shard of "as-usual" is missing."""
    photos, points, boxes, person = [], [], [], []
    for kind in kinds:
        for first in range(people.start, people.stop, SHARD):
            path = Path(folder) / kind / f"{first:06d}.npz"
            if kind != "as-usual" and not path.exists():
                continue
            with np.load(path) as shard:
                count, views = min(len(shard["im"]), people.stop - first), shard["im"].shape[1]
                photos.append(shard["im"][:count].reshape(-1, *shard["im"].shape[2:]))
                points.append(shard["kps"][:count].reshape(-1, 5, 2))
                boxes.append(shard["box"][:count].reshape(-1, 4))
                person.append(np.repeat(np.arange(count) + first - people.start, views))
    return Photos(*(np.concatenate(parts) for parts in (photos, points, boxes, person)))
