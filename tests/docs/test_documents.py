"""Every document: links lead somewhere, files and keys that it names exist, generated pages are current."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lora_diffusion
from lora_diffusion.config import to_dict

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


def script(name: str) -> Any:
    """A program of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_reference_is_current() -> None:
    written = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert written == script("configuration").page(), "write it anew: python docs/configuration.py"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {prefix + k: v} for k, v in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def test_the_reference_has_the_defaults_of_a_whole_configuration() -> None:
    reference = script("configuration")
    required = {"CorpusConfig": ("a", "b"), "ImportConfig": ("a", "b", None, "e.npy"), "Config": ("a", "b")}
    for job, cls in reference.JOBS.items():
        section = reference.page().partition(f"\n## {job}\n")[2].partition("\n## ")[0]
        told = dict(re.findall(r"^\| `([\w.]+)` \| `(?:.*?)` \| `(.*?)` \|", section, re.M))
        defaults = flat(to_dict(cls(*required.get(cls.__name__, ()))))
        wrong = {
            key: (value, reference.repr_of(defaults[key]))
            for key, value in told.items()
            if value != "required" and key != "embeddings" and value != reference.repr_of(defaults[key])
        }
        assert wrong == {}, job
        assert len(told) > 5
        if job == "jobs/ablate.py":
            told |= {
                key: row[1]
                for prefix, part in reference.INSIDE.items()
                for key, *row in reference.rows(part, prefix)
                if row[1] == reference.repr_of(defaults[key])
            }
        assert set(told) == set(defaults), job


def test_command_line_reference_is_current() -> None:
    written = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    assert written.split() == script("command_line").page().split(), "write it anew: python docs/command_line.py"


def test_the_reference_of_the_api_has_every_public_name() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/reference/api.md").read_text(), re.M)
    assert sorted(headings) == sorted([*lora_diffusion.__all__, "Client", "AsyncClient"])


CODE = [name for name in TRACKED if name.endswith((".py", ".yaml", ".yml", ".sh")) and not name.startswith("tests/")]
NAMED_IN_CODE = re.compile(
    r"(?<![\w/])(?:docs/[\w/-]+\.md|configs/(?!x\b)[\w-]+\.yaml|(?:jobs|benchmarks|runs)/[\w/]+\.(?:py|sh))\b"
)


def test_files_that_comments_and_messages_name_exist() -> None:
    missing = {
        f"{name}: {path}"
        for name in CODE
        for path in NAMED_IN_CODE.findall((ROOT / name).read_text())
        if not (ROOT / path).exists()
    }
    assert missing == set()


def known_keys() -> set[str]:
    """Every key of every job, and the sections that they lie in."""
    table = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    keys = re.findall(r"^\| `([\w.]+)` \|", table, re.M)
    return {key.rsplit(".", n)[0] for key in keys for n in range(key.count(".") + 1)}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in HISTORY])
def test_keys_that_a_document_names_exist(name: str) -> None:
    """`pca.exact_rows`, `workers.*`, `pictures.start=FOLDER`: what begins with a section of a configuration is a key of one."""
    keys = known_keys()
    sections = {key.partition(".")[0] for key in keys if "." in key} - {"base", "corpus", "config", "synthesizer"}
    named = re.findall(r"`([a-z_]+(?:\.[a-z_A-Z0-9]+)*)\.(\w+|\*)(?:=[^`]*)?`", without_code(name))
    wrong = [
        f"{section}.{last}"
        for section, last in named
        if section.partition(".")[0] in sections
        and (section if last.endswith("*") else f"{section}.{last}") not in keys
        and not re.fullmatch(r"json|jsonl|js|py|zip|yaml|md|png|html|parquet|safetensors|txt|npz|svg", last)
    ]
    assert wrong == []


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
