"""What a person typed becomes an address by one function, wherever it was typed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_diffusion.cli import main
from lora_diffusion.config import load_config, placed
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.evaluation.ablation import AblationConfig
from lora_diffusion.faces.embedder import BUNDLED, EmbedderConfig, model_folder
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.lora import shared_start
from lora_diffusion.models import stable_diffusion
from lora_diffusion.models.stable_diffusion import resolve_model
from lora_diffusion.places import SHIPPED, Output, Place, PlaceOrName, local_place, place, place_or_name
from lora_diffusion.serving.latents import synthesizer_folder
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis import synthesizer
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.train_config import TrainConfig


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a home of the test's own."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_local_path_becomes_absolute_however_it_is_written(here: Path) -> None:
    for typed, expected in (
        ("out", here / "out"),
        ("./out/", here / "out"),
        ("a/../out", here / "out"),
        (Path("out"), here / "out"),
        ("~", here / "home"),
        ("~/out", here / "home" / "out"),
        (Path("~/out"), here / "home" / "out"),
        ("$SCRATCH/out", here / "scratch" / "out"),
        ("${SCRATCH}/out", here / "scratch" / "out"),
        ("/x/Zoë 😀", "/x/Zoë 😀"),
        ("file:///x/a%20b", "/x/a b"),
        ("file://localhost/x", "/x"),
        ("file:/x", "/x"),
        ("file:out", here / "out"),
        ("FILE:///x", "/x"),
        ("12:30/out", here / "12:30" / "out"),
        ("a b:c", here / "a b:c"),
    ):
        assert place(typed) == str(expected), typed


def test_a_bucket_is_a_bucket_however_it_is_written() -> None:
    for typed in (
        "s3://bucket/x",
        "s3:/bucket/x",
        "s3:bucket/x",
        "S3://bucket/x/",
        "s3a://bucket/x",
        " s3://bucket/x\n",
        "s3:///bucket/x",
        Path("s3://bucket/x"),
    ):
        assert place(typed) == "s3://bucket/x", typed
        assert open_store(typed).root == "bucket/x"


def test_what_is_no_place_is_refused_in_a_sentence() -> None:
    for typed, message in (
        ("", "is no path"),
        ("  ", "is no path"),
        ("a\0b", "is no path"),
        ("gs://bucket/x", "give a local folder or s3://bucket/prefix"),
        ("https://bucket.s3.amazonaws.com/x", "give a local folder or s3://bucket/prefix"),
        (Path("gs://bucket/x"), "give a local folder or s3://bucket/prefix"),
        ("s3://", "needs a bucket"),
        ("s3:", "needs a bucket"),
        ("file://server/x", "names the machine server"),
        ("~nobody-of-this-name/x", "has no user 'nobody-of-this-name'"),
        ("$NOT_SET_ANYWHERE/x", r"no environment variable \$NOT_SET_ANYWHERE"),
    ):
        with pytest.raises(ValueError, match=message):
            place(typed)
    with pytest.raises(ValueError, match=r"data\.cache must lie on this machine, not at s3://b/x"):
        local_place("s3:/b/x", "data.cache")


def test_nothing_is_written_for_a_place_that_is_only_named(here: Path) -> None:
    open_store("~/corpus")
    assert list((here / "home").iterdir()) == []
    open_store("~/corpus").write("x", b"1")
    assert (here / "home" / "corpus" / "x").read_bytes() == b"1"


def test_a_name_stays_a_name_and_a_path_becomes_absolute(here: Path) -> None:
    (here / "models" / "sd").mkdir(parents=True)
    (here / "tiny-sd").mkdir()
    for typed, expected in (
        ("tiny-sd", "tiny-sd"),  # what ships wins over a folder of its name
        ("./tiny-sd", str(here / "tiny-sd")),
        ("models/sd", str(here / "models" / "sd")),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("buffalo_l", "buffalo_l"),
        ("~/sd", str(here / "home" / "sd")),
        ("s3:/bucket/sd", "s3://bucket/sd"),
    ):
        assert place_or_name(typed) == expected
    shipped = (stable_diffusion.EMBEDDED, shared_start.EMBEDDED, synthesizer.EMBEDDED, BUNDLED)
    assert set(SHIPPED) == set().union(*shipped)


def test_every_path_of_a_configuration_becomes_an_address(here: Path) -> None:
    made = placed(
        load_config(
            CorpusConfig,
            None,
            ["people=photos", "output=s3:/b/x", "base=~/sd", "embedder.model=./pack", "lora.start=~/start.safetensors"],
        )
    )
    home = here / "home"
    assert (made.people, made.output, made.base) == (str(here / "photos"), "s3://b/x", str(home / "sd"))
    assert (made.embedder.model, made.lora.start) == (str(here / "pack"), str(home / "start.safetensors"))
    assert made.embedder.root == str(home / ".insightface")
    trained = placed(load_config(TrainConfig, None, ["corpus=~/corpus", "data.cache=cache"]))
    assert (trained.corpus, trained.data.cache) == (str(home / "corpus"), str(here / "cache"))
    assert trained.output == str(here / "runs" / "tiny" / "training")
    ablated = placed(
        load_config(AblationConfig, None, ["corpora.other=~/b", "evaluation.synthesizers.a=~/a", "evaluation.corpus=c"])
    )
    assert ablated.corpora == {"other": str(home / "b")}
    assert ablated.evaluation.synthesizers == {"a": str(home / "a")}
    assert ablated.evaluation.corpus == str(here / "c")
    with pytest.raises(ValueError, match=r"evaluation.corpus: cannot open 'gs://b'"):
        placed(load_config(AblationConfig, None, ["evaluation.corpus=gs://b"]))


@dataclass(frozen=True)
class _Section:
    folder: Place = ""


@dataclass(frozen=True)
class _Config:
    people: Place = "photos"
    output: Output = "out"
    base: PlaceOrName | None = None
    section: _Section = field(default_factory=_Section)


def test_a_relative_output_is_refused_in_rays_temporary_copy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `ray job submit --working-dir .` runs a job; what lies there is read, but must not be written."""
    copy = here / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1234"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ValueError, match=r"output=out would lie in Ray's temporary copy .* absolute path"):
        placed(_Config())
    found = placed(_Config(output=str(here / "out")))
    assert (found.people, found.output, found.section.folder) == (str(copy / "photos"), str(here / "out"), "")


def test_a_tilde_is_the_home_folder_for_everything_that_takes_a_path(here: Path) -> None:
    """Each of them once, at a place that is not there: the message names the home folder."""
    home = str(here / "home")
    for use in (
        lambda: Synthesizer.from_pretrained("~/nothing"),
        lambda: CorpusReader("~/nothing"),
        lambda: model_folder(EmbedderConfig(model="~/nothing")),
        lambda: synthesizer_folder("~/nothing"),
        lambda: load_config(_Config, "~/nothing"),
    ):
        with pytest.raises(ValueError, match=f"{home}/nothing"):
            use()
    assert resolve_model("~/nothing") == f"{home}/nothing"
    with pytest.raises(SystemExit, match=f"there is no file {home}/nothing.jpg"):
        main(["personalize", "~/nothing.jpg", "--out", "~/out"])
    assert not os.listdir(home)
