"""pyproject.toml, requirements.txt and constraints.txt say the same; none names a place but PyPI."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Name -> version of the lines name==version; where a name stands for several Pythons, the newest counts."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / file).read_text(), re.M)
    return {plain(name): version for name, version in sorted(found, key=lambda pin: Version(pin[1]))}


LOCKED = pins("requirements.txt")


def test_constraints_have_the_locked_versions() -> None:
    exact = pins("constraints.txt")
    assert {name: exact[name] for name in LOCKED if name != "setuptools"} == {
        name: version for name, version in LOCKED.items() if name != "setuptools"
    }
    only_there = {"uv", "torch", "sympy", "mpmath", "boto3", "s3transfer"}  # of torch, and of the extra `cluster`
    assert set(exact) - set(LOCKED) <= only_there


def test_every_requirement_is_locked_within_its_range() -> None:
    exact = pins("constraints.txt")
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        if plain(wanted.name) != "lora-diffusion":
            assert wanted.specifier.contains(exact[plain(wanted.name)]), text


def test_what_make_installs_has_hashes_and_names_no_place() -> None:
    text = (ROOT / "requirements.txt").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        assert line.startswith("#") or "--hash=sha256:" in line, line
    assert "://" not in text
