#!/usr/bin/env python
"""Write docs/reference/command-line.md: what each command says when it is asked for --help."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

TARGET = Path(__file__).parent / "reference" / "command-line.md"
HEAD = """# Command line

What each command says to `--help`. In the repository, `jobs/build_corpus.py`, `jobs/train.py`, `jobs/evaluate.py`, `jobs/ablate.py`,
`jobs/publish.py` and `jobs/import_weights2weights.py` are the same commands as scripts, for `ray job submit`. Settings are the [keys of the configuration](configuration.md).
This page is written by `docs/command_line.py`: do not edit it. What a command returns: [exit codes](exit-codes.md).
"""


def help_of(words: list[str]) -> str:
    from lora_diffusion.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    lines = [line.rstrip() for line in said.getvalue().strip().splitlines()]
    return "\n".join(lines)


def page() -> str:
    """The text, the same on every machine: of one width, without colours, and without what the environment sets."""
    from lora_diffusion.jobs.run import JOBS

    before = dict(os.environ)
    for name in ("RAY_ADDRESS", "LORA_DIFFUSION_SERVER", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ |= {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    try:
        parts = [HEAD]
        for words in ([], ["personalize"], ["convert"], ["verify"], ["forget"], *([job] for job in JOBS)):
            title = re.sub(r"\s+", " ", f"lora-diffusion {' '.join(words)}").strip()
            parts.append(f"\n## {title}\n\n```text\n{help_of(list(words))}\n```\n")
        return "".join(parts)
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    TARGET.write_text(page())
