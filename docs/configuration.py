#!/usr/bin/env python
"""Write docs/reference/configuration.md: every key of every job, with type, default and meaning, from the dataclasses.

The meaning of a key is its `name: ...` entry in the docstring of its class, or the comment beside or above the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_diffusion.evaluation.ablation import AblationConfig
from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.weights2weights import ImportConfig
from lora_diffusion.jobs.export import Config as ExportConfig
from lora_diffusion.jobs.publish import Config as PublishConfig
from lora_diffusion.jobs.serve import Config as CommandConfig
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.synthesis.training.train_config import TrainConfig

TARGET = Path(__file__).parent / "reference" / "configuration.md"
JOBS = {
    "jobs/build_corpus.py": CorpusConfig,
    "jobs/train.py": TrainConfig,
    "jobs/evaluate.py": EvaluationConfig,
    "jobs/ablate.py": AblationConfig,
    "jobs/publish.py": PublishConfig,
    "jobs/import_weights2weights.py": ImportConfig,
    "lora-diffusion export": ExportConfig,
    "serve/app.py": ServeConfig,
}
# parts of jobs/ablate.py that have a table of their own
INSIDE = {"evaluation.": EvaluationConfig, "training.": TrainConfig}
HEAD = """# Configuration

Every key of every job. A key is set in a YAML file or on the command line as `key.sub=value`; an unknown key is an error
that lists the valid ones. This page is written by `docs/configuration.py` from the dataclasses: do not edit it.
"""


def meanings(cls: type[Any]) -> dict[str, str]:
    """Field -> meaning, of one dataclass."""
    found: dict[str, str] = {}
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        beside = re.search(r"#\s*(.*)$", lines[node.end_lineno - 1][node.end_col_offset :])  # type: ignore[operator]
        above, row = [], node.lineno - 2
        while lines[row].strip().startswith("#"):
            above.insert(0, lines[row].strip().lstrip("# "))
            row -= 1
        if beside or above:
            found[node.target.id] = beside[1] if beside else " ".join(above)
    names = {field.name for field in dataclasses.fields(cls)}
    several = re.compile(rf"[;.] (?=(?:{'|'.join(names)}): )")  # entries that share a line
    entry: list[str] = []
    for line in several.sub("\n", inspect.cleandoc(cls.__doc__ or "")).splitlines():
        start = re.match(r"([\w`]+(?:, [\w`]+)*): (.*)", line)
        if start and (keys := start[1].replace("`", "").split(", ")) and set(keys) <= names:
            entry = keys
            found.update(dict.fromkeys(keys, start[2]))
        elif line.strip() and entry:
            found.update({key: f"{found[key]} {line.strip()}" for key in entry})
        else:
            entry = []
    typed = {"None": "null", "True": "true", "False": "false"}  # what one types in YAML
    return {key: re.sub(r"\b(None|True|False)\b", lambda m: typed[m[1]], text) for key, text in found.items()}


def rows(cls: type[Any], prefix: str = "", whole: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of a dataclass and of those inside it; `whole`: the instance that the defaults are of."""
    hints, means = typing.get_type_hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        value = getattr(whole, field.name) if whole is not None else field.default
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from rows(hint, f"{key}.", value)
        else:
            default = "required" if value is dataclasses.MISSING else repr_of(value)
            yield key, type_of(hint), default, means.get(field.name, "")


def type_of(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"\b(typing|collections\.abc|types)\.|\b\w+(?:\.\w+)+\.(?=[A-Z])", "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: " or ".join(m[1].replace("'", "").split(", ")), text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 | null", text)
    return text.replace("NoneType", "None").replace("None", "null")


def repr_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(repr_of(item) for item in value) + "]"
    return '""' if value == "" else str(value)


def table(found: Iterable[tuple[str, str, str, str]]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for row in found:
        cells = [f"`{cell}`" if i < 3 else cell for i, cell in enumerate(row)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    parts = [HEAD]
    for job, cls in JOBS.items():
        parts.append(f"\n## {job}\n")
        found = list(rows(cls))
        if cls is AblationConfig:
            parts.append(
                "`evaluation.*` has the keys of jobs/evaluate.py, `training.*` those of jobs/train.py. "
                "Of these two, the table has the defaults that differ.\n"
            )
            same = {(prefix + key, *rest) for prefix, part in INSIDE.items() for key, *rest in rows(part)}
            found = [row for row in found if row not in same]
        parts += table(found)
    parts.append("\n## lora-diffusion serve\n\nTakes the keys of serve/app.py, and where it listens.\n")
    own = {field.name for field in dataclasses.fields(CommandConfig)} - {
        f.name for f in dataclasses.fields(ServeConfig)
    }
    parts += table(row for row in rows(CommandConfig) if row[0] in own)
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page())
