"""The wheel in an environment that holds what its extras ask for and nothing else. Works without a network.

Packages are links to those of the environment that runs the tests: whatever a requirement of the wheel does not name,
directly or through others, cannot be imported.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ("lora_diffusion", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
START = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"


def build_wheel(folder: Path) -> Path:
    """Of a copy of the sources, as building leaves things behind. Raises CalledProcessError."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, extra: str, folder: Path) -> Path:
    """A new environment in `folder` with `wheel[extra]`; its folder of programs. Raises PackageNotFoundError for what is
    asked for but not installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site, programs = next(folder.glob("lib/python*/site-packages")), folder / "bin"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (ours,) = distributions(name="lora-diffusion", path=[str(site)])
    for found in [ours, *_required(ours, {extra})]:
        if found is not ours:
            _link(found, site)
        for entry in found.entry_points.select(group="console_scripts"):
            module, _, name = entry.value.partition(":")
            program = programs / entry.name
            program.write_text(START.format(python=programs / "python", module=module, name=name.partition(" ")[0]))
            program.chmod(0o755)
    return programs


def _required(ours: Distribution, extras: set[str]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()

    def visit(source: Distribution, extras: set[str]) -> None:
        for text in source.requires or []:
            one = Requirement(text)
            if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            name = re.sub(r"[-_.]+", "-", one.name).lower()
            wanted = {(name, extra) for extra in one.extras | {""}}
            if wanted <= seen:
                continue
            seen.update(wanted)
            if name == "lora-diffusion":
                visit(ours, set(one.extras))
                continue
            found[name] = distribution(name)
            visit(found[name], set(one.extras))

    visit(ours, extras)
    return list(found.values())


def _link(found: Distribution, site: Path) -> None:
    """Each folder at the top as one link; file by file where several packages share it (google, opentelemetry, ...)."""
    base = Path(str(found.locate_file("")))
    for file in found.files or []:
        top = file.parts[0]
        shared = (base / top).is_dir() and not top.endswith("-info") and not (base / top / "__init__.py").exists()
        name = str(file) if shared else top
        if top == ".." or "__pycache__" in file.parts or (site / name).exists() or not (base / name).exists():
            continue
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).symlink_to(base / name)
