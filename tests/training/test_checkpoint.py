"""Checkpoints are written and read one tensor at a time: training needs little more memory than its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.storage import Store, open_store
from lora_diffusion.training.checkpoint import SavedTensors, pack, pieces, unpack
from lora_diffusion.training.distributed import like_parameter

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3).T,  # not contiguous
    "a.step": torch.tensor(7, dtype=torch.int64),
    "c.half": torch.full((3,), 0.5, dtype=torch.bfloat16),
    "d.none": torch.zeros(0, 4),
}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path)
    return open_store(f"s3://{request.getfixturevalue('bucket')}/state")


def test_what_is_written_piece_by_piece_is_a_safetensors_file(store: Store, tmp_path: Path) -> None:
    store.write_parts("x.safetensors", pieces(TENSORS, {"step": 3}))
    assert store.read("x.safetensors") == pack(TENSORS, {"step": 3})
    found, meta = unpack(store, "x.safetensors") or ({}, {})
    assert meta == {"step": 3}
    (tmp_path / "y.safetensors").write_bytes(store.read("x.safetensors"))
    whole = load_file(tmp_path / "y.safetensors")
    assert whole.pop("sha256").shape == (32,)
    for tensors in (found, whole):
        assert tensors.keys() == TENSORS.keys()
        assert all(
            torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items()
        )
    assert unpack(store, "nothing.safetensors") is None


def test_a_write_that_breaks_off_leaves_what_was_there(store: Store) -> None:
    def broken() -> object:
        yield b"x" * 70_000_000  # more than one part of an upload
        raise OSError("the network is gone")

    store.write("x", b"before")
    with pytest.raises(OSError, match="the network is gone"):
        store.write_parts("x", broken())  # type: ignore[arg-type]
    assert store.read("x") == b"before"
    assert set(store.files()) == {"x"}


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, cut: int) -> None:
    store = open_store(tmp_path)
    store.write("x.safetensors", pack(TENSORS, {})[:cut])
    with pytest.raises(ValueError, match=r"x.safetensors cannot be read .* Delete it: the same command makes it anew"):
        dict(SavedTensors(store, "x.safetensors"))
    store.write("x.safetensors", b"\xff" * 100)
    with pytest.raises(ValueError, match=r"x.safetensors cannot be read"):
        SavedTensors(store, "x.safetensors")


def test_every_changed_byte_is_noticed_and_a_checkpoint_without_a_checksum_is_read(tmp_path: Path) -> None:
    store, whole = open_store(tmp_path), pack(TENSORS, {"step": 3})
    for at in range(len(whole)):
        for change in (1, 0xFF):
            (tmp_path / "x.safetensors").write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"x.safetensors cannot be read"):
                unpack(store, "x.safetensors")
    aligned = sorted(TENSORS, key=lambda key: -TENSORS[key].element_size())
    old = {key: TENSORS[key].contiguous() for key in aligned}
    save_file(old, tmp_path / "old.safetensors", {"meta": '{"step": 3}'})
    assert unpack(store, "old.safetensors")[1] == {"step": 3}  # type: ignore[index]


@pytest.mark.parametrize(
    "header",
    ['{"__metadata__":{"meta":"{}"},"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,0]}}', "[" * 10**5],
)
def test_a_hostile_header_takes_no_memory(tmp_path: Path, header: str) -> None:
    store = open_store(tmp_path)
    store.write("x.safetensors", len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match="cannot be read"):
        unpack(store, "x.safetensors")


@pytest.mark.slow
def test_a_checkpoint_takes_no_more_memory_than_its_largest_tensor(tmp_path: Path) -> None:
    """20 layers of 2 M parameters: the state is 640 MB, a layer 8."""
    script = """
import resource, sys, torch
from lora_diffusion.storage import open_store
from lora_diffusion.training.state import TrainingState
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def new():
    parameters = {f"{i}": torch.nn.Parameter(torch.full((1000, 2000), float(i))) for i in range(20)}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    return TrainingState("vae", open_store(sys.argv[1]), parameters, optimizer, Config(), {}), optimizer
from lora_diffusion.training.loop import LoopConfig as Config
state, optimizer = new()
for parameter in state.parameters.values(): parameter.grad = torch.ones_like(parameter)
optimizer.step()
state.step = 5
before = peak()
state.save(write=True)
state.save_best(write=True)
print("written", peak() - before)
del state.average, state.optimizer, optimizer
for parameter in state.parameters.values(): parameter.grad = None
again, _ = new()
assert again.restore() == 5
assert all(torch.equal(again.parameters[k], p) for k, p in state.parameters.items())
print("read", peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert grown["written"] < 40_000_000
    assert grown["read"] < 100_000_000


def test_a_restored_step_count_lies_where_the_parameter_does() -> None:
    """A fused optimiser on a GPU takes no other: every resumed training failed at its first step there."""
    parameter = torch.empty(3, device="meta")
    assert like_parameter(torch.tensor(7.0), parameter).device == parameter.device
    assert like_parameter(torch.zeros(3), parameter).device == parameter.device
