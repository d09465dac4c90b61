"""Which export is for whom: what each program makes of each file, and what user interfaces read in its header."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfyui import patch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipeline import draw, tiny_pipeline
from tiny_unet import tiny_unet
from torch import Tensor, nn

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.formats import Format, load, read_metadata, save, to_bytes
from lora_diffusion.lora.layout import LoRALayout, shape_of
from lora_diffusion.models.known_unets import meta_unet
from lora_diffusion.storage import open_store


def every_layer(unet: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in unet.named_modules() if shape_of(module))


def random_vector(layout: LoRALayout, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.size, generator=generator) * (0.02 / layout.scale) ** 0.5


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return unet.double()(latents.double(), 500, states.double()).sample


LAYOUT = LoRALayout.from_unet(tiny_unet(), rank=2, target_modules=every_layer(tiny_unet()), alpha=7.0)
VECTOR = random_vector(LAYOUT)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def test_the_default_export_is_exact_in_comfyui_diffusers_and_by_kohyas_definition(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """For LoRAs on every layer of a UNet that can carry one."""
    path = save(VECTOR, LAYOUT, tmp_path / "ada.safetensors")
    unet = tiny_unet().double()
    with LoRABank(unet, LAYOUT).active(VECTOR[None], samples_per_identity=2):
        ours = forward(unet)
    comfy = tiny_unet()
    patched, unused = patch(comfy, load_file(path), per_block=1)
    assert (len(patched), unused) == (len(LAYOUT.entries), [])
    torch.testing.assert_close(forward(comfy), ours, rtol=1e-4, atol=1e-4)
    assert (forward(tiny_unet()) - ours).abs().max() > 1e-2

    with LoRABank(pipe.unet, LAYOUT).active(VECTOR[None], samples_per_identity=2):
        ours = draw(pipe)
    pipe.load_lora_weights(path)
    torch.testing.assert_close(draw(pipe), ours, rtol=1e-4, atol=2e-5)
    pipe.unload_lora_weights()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_comfyui_takes_every_layer_of_the_default_export_and_not_of_the_others(tmp_path: Path, family: str) -> None:
    """What the table in docs/reference/formats.md says of diffusers' and peft's files: there ComfyUI leaves out the attention, or all."""
    unet = meta_unet(family)
    targets = ("to_q", "to_v", "proj_in", "conv1", "ff.net.2")
    layout = LoRALayout.from_unet(unet, rank=1, target_modules=targets, alpha=2.0)
    vector = torch.zeros(layout.size)
    taken = {}
    for format in ("kohya", "diffusers", "peft"):
        tensors = load_file(
            next(Path(save(vector, layout, tmp_path / format / "x", format)).parent.rglob("*.safetensors"))
        )
        taken[format] = len(
            patch(unet, {key: tensor.to("meta") if tensor.ndim else tensor for key, tensor in tensors.items()}, 2)[0]
        )
    assert taken["kohya"] == len(layout.entries)
    assert taken["diffusers"] == sum(".to_" not in entry.name for entry in layout.entries)
    assert taken["peft"] == 0


# --- headers


def header(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_user_interfaces_find_model_name_and_trigger_in_the_header(tmp_path: Path, format: Format) -> None:
    given = {"identity": "Ada <3>, L.", "base_model": "dreamshaper", "licence": "CC0-1.0", "date": "2026-11-05"}
    found = header(to_bytes(VECTOR, LAYOUT, format, metadata=given))
    assert found | given == found
    assert (
        found
        | {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_sd_model_name": "dreamshaper",
            "ss_output_name": "Ada _3_ L.",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.title": "Ada <3>, L.",
            "modelspec.date": "2026-11-05",
            "modelspec.license": "CC0-1.0",
            "modelspec.trigger_phrase": "sks person",
        }
        == found
    )
    tags = next(iter(json.loads(found["ss_tag_frequency"]).values()))  # as A1111 and Lora Manager read it
    assert tags == {"sks person": 1}
    if format == "kohya":
        network = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "7.0"}
        assert found | network == found
    other = header(to_bytes(VECTOR, LAYOUT, format, metadata={"trigger": "ohwx man", "modelspec.title": "mine"}))
    assert (other["modelspec.trigger_phrase"], other["modelspec.title"]) == ("ohwx man", "mine")
    assert "ohwx man" in other["ss_tag_frequency"]
    assert other["modelspec.date"] >= "2026"
    save(VECTOR, LAYOUT, tmp_path / "ada.safetensors", format)
    assert read_metadata(tmp_path / "ada.safetensors")["ss_output_name"] == "ada"
    names = {header(to_bytes(random_vector(LAYOUT, seed), LAYOUT, format))["ss_output_name"] for seed in range(3)}
    assert len(names) == 3, "A1111 knows a LoRA by this name: two without one must not be the same"


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_header_names_the_family_that_the_layers_are_of(family: str, version: str, architecture: str) -> None:
    for targets in (("to_q", "to_v"), ("to_q", "to_k")):
        layout = LoRALayout.from_unet(meta_unet(family), rank=1, target_modules=targets)
        found = header(to_bytes(torch.zeros(layout.size), layout))
        assert (found["ss_base_model_version"], found["modelspec.architecture"]) == (version, architecture)
        assert found["ss_v2"] == str(family == "sd2")


def test_metadata_that_is_no_text_becomes_text_or_is_refused_and_the_file_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "steps": 90,
        "rate": 0.5,
        "ok": True,
        "seeds": [1, 2],
        "who": {"name": "Zoë 😀"},
        "empty": "",
        "nul": "a\0b",
    }
    for format in ("kohya", "diffusers", "peft", "vector"):
        path = save(VECTOR, LAYOUT, tmp_path / format, format, metadata=given)
        with safe_open(next((tmp_path / format).glob("*.safetensors")), "pt") as file:
            found = file.metadata()
        assert found["steps"] == "90"
        assert found["rate"] == "0.5"
        assert json.loads(found["seeds"]) == [1, 2]
        assert json.loads(found["who"]) == {"name": "Zoë 😀"}
        assert torch.equal(load(path, LAYOUT), VECTOR)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for bad in (
        {"a": None},
        {"a": b"x"},
        {"a": "\ud800"},
        {"\udfff": "a"},
        {"a": ["\ud800"]},
        {"a": [object()]},
        {3: "a"},
        {"a": deep},
    ):
        with pytest.raises(ValueError, match="metadata"):
            to_bytes(VECTOR, LAYOUT, metadata=bad)  # type: ignore[arg-type]
    monkeypatch.setattr("lora_diffusion.lora.container.MAX_HEADER", 50_000)  # the library's 100 MB take seconds
    with pytest.raises(ValueError, match="no program opens a file"):
        to_bytes(VECTOR, LAYOUT, metadata={"a": "x" * 50_000})


# --- places


def test_what_a_person_typed_is_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert save(VECTOR, LAYOUT, "~/loras/ada.safetensors") == tmp_path / "home/loras/ada.safetensors"
    assert torch.equal(load("~/loras", LAYOUT), VECTOR)
    assert save(VECTOR, LAYOUT, "here/v1.5/") == tmp_path / "here/v1.5/lora.safetensors"
    assert save(VECTOR, LAYOUT, "ada.SAFETENSORS") == tmp_path / "ada.SAFETENSORS"
    assert torch.equal(load("ada.SAFETENSORS", LAYOUT), VECTOR)
    (tmp_path / "ada.lovelace").mkdir()
    assert save(VECTOR, LAYOUT, tmp_path / "ada.lovelace") == tmp_path / "ada.lovelace/lora.safetensors"
    assert save(VECTOR, LAYOUT, "ada.byron/") == tmp_path / "ada.byron/lora.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ada.SAFETENSORS",
        "ada.byron",
        "ada.lovelace",
        "here",
        "home",
    ]
    with pytest.raises(ValueError, match="give a local folder or s3://bucket/prefix"):
        save(VECTOR, LAYOUT, "gs://bucket/ada.safetensors")


@pytest.mark.s3
def test_a_bucket_is_a_place_too(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(VECTOR, LAYOUT, f"s3://{bucket}/ada.safetensors") == f"s3://{bucket}/ada.safetensors"
    assert save(VECTOR, LAYOUT, Path(f"s3://{bucket}/folder"), "peft") == f"s3://{bucket}/folder"
    assert sorted(open_store(f"s3://{bucket}/folder").files()) == ["adapter_config.json", "adapter_model.safetensors"]
    for place in (f"s3://{bucket}/ada.safetensors", f"s3:/{bucket}/ada.safetensors", Path(f"s3://{bucket}/folder")):
        assert torch.equal(load(place, LAYOUT), VECTOR)
    with pytest.raises(ValueError, match="does not exist"):
        load(f"s3://{bucket}/bob.safetensors", LAYOUT)
    assert not list(tmp_path.iterdir())
