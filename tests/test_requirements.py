"""pyproject.toml, uv.lock, requirements.txt and constraints.txt say the same; none names a place but PyPI."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Name -> version of the lines name==version."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / file).read_text(), re.M)
    return {plain(name): version for name, version in sorted(found, key=lambda pin: Version(pin[1]))}


THIRD = [package for package in LOCK["package"] if package["name"] != "lora-diffusion"]
# where one of them needs a newer Python, an older one stands beside it: the newest counts
LOCKED = {package["name"]: package["version"] for package in sorted(THIRD, key=lambda one: Version(one["version"]))}


def test_the_three_files_have_the_same_versions() -> None:
    assert {name: LOCKED.get(name) for name in pins("requirements.txt")} == pins("requirements.txt")
    known = {name: version for name, version in pins("constraints.txt").items() if name in LOCKED}
    assert known == {name: LOCKED[name] for name in known}
    assert set(pins("constraints.txt")) - set(LOCKED) <= {"uv"}


def test_every_requirement_is_locked_within_its_range() -> None:
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        if plain(wanted.name) != "lora-diffusion":
            assert wanted.specifier.contains(LOCKED[plain(wanted.name)]), text


def test_the_lock_was_made_from_these_requirements() -> None:
    (ours,) = (package for package in LOCK["package"] if package["name"] == "lora-diffusion")
    written = {(plain(Requirement(text).name), str(Requirement(text).specifier)) for text in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        written |= {(plain(Requirement(text).name), str(Requirement(text).specifier)) for text in extra}
    locked = {(one["name"], one.get("specifier", "")) for one in ours["metadata"]["requires-dist"]}
    assert {(name, frozenset(text.split(","))) for name, text in written if name != "lora-diffusion"} == {
        (name, frozenset(text.split(","))) for name, text in locked if name != "lora-diffusion"
    }


def test_what_make_installs_has_hashes_and_no_other_source_than_pypi() -> None:
    lines = (ROOT / "requirements.txt").read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        assert line.startswith("#") or "--hash=sha256:" in line, line
    hosts = set(re.findall(r"\w+://([^/\"]+)", (ROOT / "uv.lock").read_text()))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}
    assert "://" not in (ROOT / "requirements.txt").read_text()
    locked = {
        hash_: package["name"]
        for package in LOCK["package"]
        for file in [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
        for hash_ in [file["hash"]]
    }
    for line in lines:
        if line.startswith("#"):
            continue
        name = plain(line.split("==")[0])
        assert all(locked[hash_] == name for hash_ in re.findall(r"--hash=(sha256:\w+)", line)), name
