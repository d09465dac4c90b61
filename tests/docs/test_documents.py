"""Every document: links and anchors lead somewhere, files that it names exist, Python blocks parse, generated pages are current."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
DOCUMENTS = [name for name in TRACKED if name.endswith(".md") and not name.startswith("docs/log/")]
HISTORY = {"LOG.md", "CHANGELOG.md"}  # these may name what is gone
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
NAMED_FILE = re.compile(
    r"`((?:lora_diffusion|jobs|serve|configs|benchmarks|tests|docs|examples|deploy|runs)/[\w./-]+\.\w+)`"
)


@cache
def without_code(name: str) -> str:
    return re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.M | re.S)


@cache
def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(str(path.relative_to(ROOT))), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in plain}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_anchors_lead_somewhere(name: str) -> None:
    broken = []
    for match in LINK.finditer(without_code(name)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / name).parent / place if place else ROOT / name
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path.resolve())):
            broken.append(target)
    assert not broken, f"{name}: {broken}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in HISTORY])
def test_files_that_a_document_names_exist(name: str) -> None:
    missing = [path for path in NAMED_FILE.findall((ROOT / name).read_text()) if not (ROOT / path).exists()]
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in HISTORY])
def test_python_blocks_import_what_there_is(name: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_diffusion"):
                exec(compile(ast.Module([node], []), name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/guides/notebook.md", "docs/guides/edits.md"])
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them, with a photo `ada.jpg` beside them."""
    shutil.copy(ROOT / "lora_diffusion/endpoint/static/people/80512.jpg", tmp_path / "ada.jpg")
    (tmp_path / "lora_diffusion").symlink_to(ROOT / "lora_diffusion")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S):
        exec(compile(block, name, "exec"), names)


def test_configuration_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    assert spec is not None
    assert spec.loader is not None
    configuration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configuration)
    written = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert written == configuration.page(), "write it anew: python docs/configuration.py"


def test_readme_is_one_screen_and_a_short_read() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200, "words"
    assert len(text[: text.index("```bash")].split()) <= 250, "words before the first command"
    results = text[text.index("## Results") :]
    table = [line for line in results[: results.index("\n## ")].splitlines() if line.startswith("| ")]
    assert len(table) - 1 <= 10, "rows of results"
    for row in table[1:]:
        assert all(len(re.findall(r"\d+(?:\.\d+)?", cell)) <= 2 for cell in row.split("|")[2:4]), (
            f"one figure a cell: {row}"
        )


def test_every_configuration_key_has_a_meaning() -> None:
    lines = (ROOT / "docs" / "reference" / "configuration.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `") and line.endswith("|  |")] == []
