"""Drawing: what is refused before a step is made, and what a prompt's end is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from serve_world import base_model

from lora_diffusion.faces.choice import choose_face
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.rendering import render

LAYOUT = LoRALayout.from_unet(base_model().unet)
ONE = np.zeros((1, LAYOUT.size), np.float32)


@pytest.mark.parametrize(
    ("vectors", "prompts", "seeds", "message"),
    [
        (ONE, "abc", [0, 1, 2], "prompts is one text: give a list with a prompt for each picture"),
        (ONE, ["a", "b"], [0], "2 prompts but 1 seeds"),
        (ONE[0], ["a"], [0], r"vectors_KN has shape \(\d+,\): give \(K, N\), one row for each person"),
        (ONE[:, :80], ["a"], [0], r"vectors have shape \(1, 80\); layout"),
        (np.repeat(ONE, 2, 0), ["a"], [0], "1 pictures cannot be shared evenly by 2 people"),
    ],
)
def test_what_cannot_be_drawn_is_told(vectors: Any, prompts: Any, seeds: Any, message: str) -> None:
    bank = LoRABank(base_model().unet, LAYOUT)
    with pytest.raises(ValueError, match=message):
        render(base_model(), vectors, prompts, seeds, bank=bank, num_inference_steps=1)


def test_the_end_of_a_prompt_that_is_not_read_is_known() -> None:
    base = base_model()
    long = "a photo of sks person " + " ".join(["forest"] * 130) + " at night"
    unread = base.unread(long)
    assert long.endswith(unread)
    assert unread.endswith("forest at night")
    read = long.removesuffix(unread).strip()
    assert base.unread(read) == base.unread("") == base.unread("a photo") == ""
    assert len(base.tokenizer(read).input_ids) == base.tokenizer.model_max_length


def test_a_choice_of_faces_that_there_is_not_is_told() -> None:
    with pytest.raises(ValueError, match="faces is 'biggest': it is one of one, largest"):
        choose_face([object(), object()], None, "biggest")  # type: ignore[arg-type]
