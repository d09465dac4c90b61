"""Names from outside become paths inside of one folder, or are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.places import check_name
from lora_diffusion.storage import StoreError, open_store

FOLDER = Path("/cache/model")
PARTS = st.sampled_from(["..", ".", "", "unet", "weights.bin", "\\", "..\\x", "a\0b", "~", "C:"]) | st.text(max_size=5)


@given(st.lists(PARTS, min_size=1, max_size=6).map("/".join))
def test_any_name_is_a_path_inside_or_refused(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    path = (FOLDER / name).resolve()
    assert path.is_relative_to(FOLDER)
    assert path != FOLDER


@given(st.lists(PARTS, max_size=6).map("/".join))
def test_a_store_reads_and_writes_inside_of_its_folder_only(name: str) -> None:
    try:
        path = open_store(FOLDER).path(name)
    except ValueError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(FOLDER)


def test_a_server_cannot_choose_where_its_pictures_are_written(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out")
    for seed in ("../x", "/tmp/x", "a/../../x"):
        for touch in (lambda name: store.write(name, b"x"), store.read, store.open, store.delete):
            with pytest.raises((ValueError, StoreError), match="leads out of its folder"):
                touch(f"{seed}.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a\\..\\b", "", ".", "a/."])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        check_name(name)


@pytest.mark.parametrize("name", ["config.json", "unet/model.safetensors", "a..b", "…/ü.bin"])
def test_usual_names_pass(name: str) -> None:
    check_name(name)
