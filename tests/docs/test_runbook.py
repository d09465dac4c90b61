"""Every fault of the runbook is injected by a test that there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_tests_that_inject_its_fault() -> None:
    text, file, seen = (ROOT / "docs/RUNBOOK.md").read_text(), "", 0
    for row in re.findall(r"^\|.*`[\w/.]*::\w+` \|$", text, re.M):
        for path, name in re.findall(r"`([\w/.]*)::(\w+)`", row):
            file = path or file
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
            seen += 1
    rows = re.findall(r"^\| (?!symptom)(?!---)[^|]+ \|[^|]*\|[^|]*\|[^|]*\|$", text, re.M)
    assert len(rows) == len(re.findall(r"^\|.*`[\w/.]*::\w+` \|$", text, re.M)), "a row without a test"
    assert seen > 20
