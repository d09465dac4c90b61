"""Names from outside become paths inside of one folder, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.models.files import check_name

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


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a\\..\\b", "", ".", "a/."])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        check_name(name)


@pytest.mark.parametrize("name", ["config.json", "unet/model.safetensors", "a..b", "…/ü.bin"])
def test_usual_names_pass(name: str) -> None:
    check_name(name)
