"""`lora-diffusion convert`: any program's LoRA for any other program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_corpus import LAYOUT as CORPUS_LAYOUT
from small_corpus import NAMES, build

from lora_diffusion import cli
from lora_diffusion.cli_files import layout_like
from lora_diffusion.lora.formats import FORMATS, load, read_metadata, save
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.known_unets import meta_unet
from lora_diffusion.storage import open_store

LAYOUT = LoRALayout.from_unet(meta_unet("sd1"), rank=2, target_modules=("to_q", "to_v"), alpha=3.0)
VECTOR = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))


def test_a_lora_goes_through_every_format_and_comes_back_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its base model: the layers tell that it is Stable Diffusion 1.x."""
    path = str(
        save(VECTOR, LAYOUT, tmp_path / "0.safetensors", "kohya", metadata={"identity": "ada", "trigger": "ohwx"})
    )
    for i, format in enumerate([*FORMATS, "kohya"]):
        target = tmp_path / f"{i + 1}"
        cli.main(["convert", path, str(target), "--format", format])
        path = capsys.readouterr().out.partition("  ")[0]
        found = read_metadata(path)
        assert (found["identity"], found["trigger"]) == ("ada", "ohwx")
        assert torch.equal(load(path, LAYOUT), VECTOR)
    assert found["modelspec.trigger_phrase"] == "ohwx"


def test_a_strangers_file_gets_no_trigger_that_is_ours_and_is_brought_to_a_layout_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(save(VECTOR, LAYOUT, tmp_path / "x.safetensors"))
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file({**tensors, "lora_te_x.lora_up.weight": torch.ones(2, 2)}, theirs, {"ss_tag_frequency": "{}"})
    rank_1 = LoRALayout.from_unet(meta_unet("sd1"), rank=1, target_modules=("to_q", "to_v", "to_k"), alpha=27.0)
    like = str(save(torch.zeros(rank_1.size), rank_1, tmp_path / "like.safetensors", "vector"))
    command = ["convert", str(theirs), str(ours), "--like", like]
    for missing, option in (
        ("partial=True", "--partial"),
        ("ignore_extra=True", "--ignore-extra"),
        ("svd=True", "--svd"),
    ):
        with pytest.raises(SystemExit, match=missing):
            cli.main(command)
        command.append(option)
    cli.main(command)
    said = capsys.readouterr().out
    assert f"{ours}  kohya, rank 1, alpha 27, 96 layers" in said
    assert "% of the update's energy was kept" in said
    assert "32 layers are not in the file" in said
    found = read_metadata(ours)
    assert "modelspec.trigger_phrase" not in found
    assert found["ss_tag_frequency"] == "{}"
    half = tmp_path / "half.safetensors"
    cli.main(["convert", str(ours), str(half), "--half"])
    assert half.stat().st_size < 0.7 * ours.stat().st_size


def test_a_layout_comes_from_a_corpus_or_a_synthesiser_too(tmp_path: Path) -> None:
    build(open_store(tmp_path / "corpus"), NAMES)
    assert layout_like(str(tmp_path / "corpus")) == CORPUS_LAYOUT
    assert layout_like("tiny").size > 0
    with pytest.raises(ValueError, match="no synthesiser at"):
        layout_like(str(tmp_path))


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    flux = tmp_path / "flux.safetensors"
    save_file({"transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": torch.zeros(4, 4)}, flux)
    for arguments, message in (
        (["nothing.safetensors", "x.safetensors"], "does not exist"),
        ([str(flux), "x.safetensors"], "is a LoRA for FLUX"),
        (
            [str(flux), "x.safetensors", "--base", "sd1"],
            r"is a LoRA for FLUX; layout \w+ is one of Stable Diffusion 1\.x",
        ),
        ([str(flux), "x.safetensors", "--base", str(tmp_path)], "no base model"),
        ([str(flux), "x.safetensors", "--base", "sd1", "--like", "tiny"], "give one of them"),
    ):
        with pytest.raises(SystemExit, match=f"lora-diffusion: .*{message}"):
            cli.main(["convert", *arguments])
