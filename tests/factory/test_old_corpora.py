"""Corpora of earlier releases go on by the same command, without the settings that came later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from factory_world import build_corpus, make_config, settings

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.jobs.run import main

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes_before_same_person.json"


@pytest.mark.parametrize("name", ["tiny", "sd15"])
def test_the_recipe_is_that_of_the_release_that_began_it(name: str) -> None:
    recipe = json.loads(GOLDEN.read_text())[name]
    now = load_config(CorpusConfig, f"configs/{name}.yaml")
    assert now.recipe("recogniser") != recipe
    assert json.loads(json.dumps(now.as_begun(recipe).recipe("recogniser"))) == recipe


def test_the_job_goes_on_unless_somebody_asks_for_what_was_not_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"people": str(world / "people"), "output": str(tmp_path / "corpus")}
    build_corpus(make_config(world, **place, photos={"min_photos": 2, "same_person": None}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings(world), **place}))
    words = ["--config", str(tmp_path / "config.yaml"), "--dry-run"]
    assert main("corpus", words) == 0, capsys.readouterr().err
    assert "4 of them done" in capsys.readouterr().out
    assert main("corpus", [*words, "photos.same_person=0.3"]) == 1
    assert "photos.same_person: None there, 0.3 now" in capsys.readouterr().err
