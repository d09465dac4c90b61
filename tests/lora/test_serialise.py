"""Our safetensors writer against the library's."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from lora_diffusion.lora.formats import serialise


def test_writer_lays_tensors_out_as_the_library_does() -> None:
    tensors = {
        "b.alpha": torch.tensor(4.0),
        "b.half": torch.randn(3, 5).half(),
        "a.half": torch.randn(7).bfloat16(),
        "z.down": torch.randn(4, 3, 2)[:, :, 0],
        "count": torch.arange(3),
    }
    ours = serialise(tensors, {"z": "1", "a": "2"})
    theirs = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    begin = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert ours[begin[0] :] == theirs[begin[1] :]
    expected = json.loads(theirs[8 : begin[1]])
    assert json.loads(ours[8 : begin[0]]) == {"__metadata__": {"z": "1", "a": "2"}, **expected}
    assert begin[0] % 8 == 0
