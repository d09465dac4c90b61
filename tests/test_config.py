"""Laws of the configuration: defaults < file < words, every mistake is named, round trips lose nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from lora_diffusion.config import from_dict, load_config, to_dict, to_yaml
from lora_diffusion.factory.config import CorpusConfig


@dataclasses.dataclass(frozen=True)
class Tune:
    steps: int = 80
    learning_rate: float = 1e-2
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    tune: Tune = dataclasses.field(default_factory=lambda: Tune(steps=7))
    targets: tuple[str, ...] = ("to_q", "to_v")
    size: tuple[int, int] = (64, 64)
    gate: float | None = None
    device: int | str = "auto"
    fast: bool = False
    folder: Path = Path("x")
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate is not None and not -1 <= self.gate <= 1:
            raise ValueError(f"gate must lie in [-1, 1], not {self.gate}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ntune:\n  learning_rate: 1e-3\n")
    return path


def test_words_beat_file_beats_defaults(file: Path) -> None:
    job = load_config(Job, file, ["tune.steps=3", "targets=[to_k]", "gate=0.5", "device=0", "fast=true", "size=[8, 9]"])
    assert job == Job("a", Tune(3, 1e-3), ("to_k",), (8, 9), 0.5, 0, True)


def test_a_section_keeps_its_own_defaults(file: Path) -> None:
    assert load_config(Job, file).tune.steps == 7
    assert load_config(Job, None, ["name=a", "tune.kind=sgd"]).tune == Tune(7, 1e-2, "sgd")


def test_round_trip(file: Path, tmp_path: Path) -> None:
    job = load_config(Job, file, ["gate=none", "options.a.b=1", "options.a.c=none"])
    assert job.options == {"a": {"b": 1, "c": "none"}}
    assert from_dict(Job, to_dict(job)) == job
    (tmp_path / "again.yaml").write_text(to_yaml(job))
    assert load_config(Job, tmp_path / "again.yaml") == job


def test_a_string_field_keeps_words_that_yaml_would_read_as_something_else(file: Path) -> None:
    assert load_config(Job, file, ["name=on"]).name == "on"
    assert load_config(Job, file, ["name=s3://bucket/a=b: c"]).name == "s3://bucket/a=b: c"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nmae=b", "unknown config key 'nmae'. Did you mean 'name'\\?.*Valid keys: device, fast, folder"),
        ("tune.step=3", "unknown config key 'tune.step'. Did you mean 'tune.steps'\\? Valid keys of 'tune'"),
        ("tune.steps=many", "'tune.steps' must be a whole number, not 'many'"),
        ("tune.steps=1.5", "'tune.steps' must be a whole number"),
        ("tune.kind=adam", "one of adamw, sgd"),
        ("fast=1", "true or false"),
        ("size=[1]", "a list of 2 values"),
        ("targets=to_q", "a list, such as"),
        ("tune=3", "a section with keys steps, learning_rate, kind"),
        ("name.sub=3", "'name' is a value, not a section"),
        ("gate=2", "gate must lie in"),
        ("steps", "not of the form key=value"),
    ],
)
def test_every_mistake_is_named(file: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Job, file, [word])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_config(Job, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_config(Job, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(Job, tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match="config is missing name"):
        load_config(Job)


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    """The last one counted, with its whole section."""
    (tmp_path / "x.yaml").write_text("limit: 5\nfinetune:\n  steps: 500\nfinetune:\n  learning_rate: 0.1\n")
    with pytest.raises(ValueError, match=r"key 'finetune' stands in line 2 and again in line 4"):
        load_config(CorpusConfig, tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text("common: &b {steps: 3}\nfinetune:\n  <<: *b\n  steps: 4\n")
    with pytest.raises(ValueError, match="unknown config key 'common'"):  # a merge key is none that stands twice
        load_config(CorpusConfig, tmp_path / "y.yaml")


@dataclasses.dataclass(frozen=True)
class Outer:
    job: Job = dataclasses.field(default_factory=lambda: Job("a", Tune(7, 0.5, "sgd")))


def test_a_sections_own_defaults_hold_within_its_sections() -> None:
    assert load_config(Outer, None, ["job.tune.steps=9"]).job == Job("a", Tune(9, 0.5, "sgd"))


@pytest.mark.parametrize("word", ["none", "None", "NULL", "~", ""])
def test_none_is_written_in_many_ways(word: str) -> None:
    assert load_config(Job, None, ["name=a", f"gate={word}"]).gate is None


def test_true_is_no_number() -> None:
    for word, message in {"tune.steps=true": "a whole number", "tune.learning_rate=true": "a number"}.items():
        with pytest.raises(ValueError, match=message):
            load_config(Job, None, ["name=a", word])
