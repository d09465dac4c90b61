"""The report is one file, holds the figures it was given, and says what was not measured."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_world import RECOGNISERS, methods_of
from PIL import Image
from test_ablation import record

from lora_diffusion.artifacts.provenance import provenance
from lora_diffusion.config import to_dict
from lora_diffusion.evaluation.ablation import AblationConfig, Variant
from lora_diffusion.evaluation.ablation_results import compared
from lora_diffusion.evaluation.report import write_report
from lora_diffusion.evaluation.results import tabulate
from lora_diffusion.evaluation.sheet import Column, contact_sheet
from lora_diffusion.storage import open_store

CONFIG = AblationConfig(seeds=2, other_seeds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    held, methods, scores = methods_of(12)
    results = {
        **provenance(),
        "config": {},
        "corpus": {},
        "held_out": {"people": 12, "left_out": {}},
        "recognisers": RECOGNISERS,
        **tabulate(methods, scores, held, RECOGNISERS, "synthesised:latent"),
        "facts": {
            "explained_variance": {"rows": 40, "cumulative": [0.3, 0.6, 0.95, 1.0]},
            "synthesizers": {
                "latent": {
                    "codes": "latent",
                    "code_size": 8,
                    "parameters": 1000,
                    "reconstruction": {"r2": 0.5, "relative_error": 0.7},
                }
            },
        },
    }
    write_report(open_store(path), json.loads(json.dumps(results)), held, methods, scores, ablations())
    return path


def ablations() -> tuple[dict[str, object], list[dict[str, object]]]:
    changes = [{}, {"conditioning": "adanorm"}, {"code_space": "vector"}, {"code_space": "pca"}, {"people": 250}]
    records = [
        record(Variant(**change, seed=seed), 0.3 + 0.02 * i, 0.01 * seed)  # type: ignore[arg-type]
        for i, change in enumerate(changes)
        for seed in (0, 1)
    ]
    table = compared(CONFIG, records, 900)
    results = {"recognisers": RECOGNISERS, "table": table, "config": to_dict(CONFIG)}
    best = {name: {"mean": 0.1, "low": 0.0, "high": 0.2} for name in RECOGNISERS}
    return results, [{"name": "base", "variant": None, "best": best}, *records]


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=['"](?!data:)""", page)
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == len(list(folder.glob("*.png")))


def test_every_method_and_every_factor_is_in_the_page(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for words in (
        "nearest neighbour in the corpus",
        "fine-tuned on the photos",
        "synthesised, latent",
        "AdaNorm",
        "250 people",
    ):
        assert words in page, words


def test_the_figures_that_the_issue_names_are_there(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.png")}
    assert names >= {
        "similarity",
        "scales",
        "explained_variance",
        "spaces",
        "conditioning",
        "corpus_size",
        "contact_sheet",
    }
    for path in folder.glob("*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 5, f"{path.name} is blank"


def test_a_contact_sheet_shows_the_pictures_that_it_was_given() -> None:
    red, blue = np.zeros((2, 2, 8, 8, 3), np.uint8), np.zeros((2, 1, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    data = contact_sheet([Column("photo", blue), Column("a long title that must wrap", red, np.array([0.1, 0.2]))], 2)
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    is_red = (sheet == (255, 0, 0)).all(-1).sum()
    is_blue = (sheet == (0, 0, 255)).all(-1).sum()
    assert is_red == 2 * is_blue > 0
