"""The ComfyUI node: its class with a real endpoint, and in process, on a real UNet.

ComfyUI is no package that can be installed: `comfy` here is what its node calls, by the public rules in tests/support/comfyui.py.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui import accepted_names, patch
from http_endpoint import in_process
from PIL import Image
from serve_world import base_model, save_synthesizer
from tiny_unet import tiny_unet

from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.local import local_studio
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.synthesis.synthesizer import Synthesizer

ROOT = Path(__file__).parents[2]
FACES = ROOT / "tests" / "data" / "faces"
ADA, ADA_AGAIN, BOB = (FACES / name for name in ("80000-0.png", "80000-1.png", "80001-1.png"))
PER_BLOCK = 1  # resnets of each block of tiny-sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("synthesizer"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with in_process(build_api(local_studio(ServeConfig(synthesizer=str(folder))))) as address:
        yield address


class Patcher:
    """ComfyUI's MODEL: `model` holds the UNet; `clone` leaves this one as it is."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.model = unet


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of the node's class, loaded as ComfyUI does: from its file."""

    def keys(unet: torch.nn.Module, found: dict[str, str]) -> dict[str, str]:
        for layer, module in unet.named_modules():
            if getattr(module, "weight", None) is not None:
                found |= dict.fromkeys(accepted_names(layer, PER_BLOCK), layer)
        return found

    def load(model: Patcher, clip: None, lora: dict[str, torch.Tensor], strength: float, clip_strength: float) -> Any:
        lora = {key: strength * tensor if "lora_up" in key else tensor for key, tensor in lora.items()}
        unet = copy.deepcopy(model.model)
        assert patch(unet, lora, PER_BLOCK)[1] == []
        return Patcher(unet), clip

    comfy, comfy_lora, sd = (types.ModuleType(name) for name in ("comfy", "comfy.lora", "comfy.sd"))
    comfy.lora, comfy.sd = comfy_lora, sd  # type: ignore[attr-defined]
    comfy_lora.model_lora_keys_unet, sd.load_lora_for_models = keys, load  # type: ignore[attr-defined]
    for module in (comfy, comfy_lora, sd):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("node", ROOT / "integrations" / "comfyui" / "lora_diffusion_node.py")
    assert spec is not None
    assert spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    (made,) = file.NODE_CLASS_MAPPINGS.values()
    assert file.NODE_DISPLAY_NAME_MAPPINGS.keys() == file.NODE_CLASS_MAPPINGS.keys()
    return made()


def image(*photos: Path) -> torch.Tensor:
    """IMAGE (B, H, W, 3), 0 to 1."""
    return torch.from_numpy(
        np.stack([np.asarray(Image.open(photo).convert("RGB")) for photo in photos]) / np.float32(255)
    )


def run(node: Any, model: Patcher, **inputs: Any) -> Patcher:
    """With the node's own defaults for what is not given, as ComfyUI fills them in."""
    defaults = {name: spec[1].get("default") for name, spec in node.INPUT_TYPES()["required"].items() if len(spec) > 1}
    (made,) = getattr(node, node.FUNCTION)(**{**defaults, "model": model, **inputs})
    return made  # type: ignore[no-any-return]


def forward(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.randn(1, unet.config.in_channels, size, size, generator=generator)
    with torch.no_grad():
        return unet(x, 300, torch.randn(1, 7, width, generator=generator)).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("photos", [(ADA,), (ADA, ADA_AGAIN)])
def test_the_model_draws_with_the_persons_lora_by_a_server_as_in_process(
    node: Any, folder: Path, address: str, photos: tuple[Path, ...]
) -> None:
    unet = copy.deepcopy(base_model().unet)
    before, synthesizer = forward(unet), Synthesizer.from_pretrained(folder)
    vector = torch.from_numpy(synthesizer.from_photo(list(photos), seed=3))
    with LoRABank(unet, synthesizer.layout).active(vector, samples_per_identity=1):
        expected = forward(unet)
    assert (expected - before).abs().max() > 1e-2
    for where in ({"server": address}, {"server": "", "synthesizer": str(folder)}):
        made = run(node, Patcher(unet), photos=image(*photos), seed=3, **where)
        torch.testing.assert_close(forward(made.model), expected, rtol=1e-3, atol=1e-3)
        without = run(node, Patcher(unet), photos=image(*photos), seed=3, strength=0.0, **where)
        torch.testing.assert_close(forward(without.model), before)
    torch.testing.assert_close(forward(unet), before)


def test_what_is_wrong_is_said_as_the_server_and_the_library_say_it(node: Any, folder: Path, address: str) -> None:
    grey, unet = torch.full((1, 64, 64, 3), 0.5), base_model().unet
    two = torch.cat([image(ADA), image(BOB)], 2)
    for where in ({"server": address}, {"server": "", "synthesizer": str(folder)}):
        with pytest.raises(ValueError, match="shows no face"):
            run(node, Patcher(unet), photos=grey, **where)
        with pytest.raises(ValueError, match="shows 2 faces"):
            run(node, Patcher(unet), photos=two, **where)
        run(node, Patcher(unet), photos=two, largest_face=True, **where)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 cannot be reached .*Is `lora-diffusion serve` running"):
        run(node, Patcher(unet), photos=image(ADA), server="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"another base model: this one lacks \d+ of its \d+ layers"):
        run(node, Patcher(torch.nn.Sequential(tiny_unet())), photos=image(ADA), server=address)
