"""Laws of the LoRA files: what other programs load draws what the bank draws, and nothing is lost on the way."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import draw, tiny_pipeline
from tiny_unet import tiny_unet
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.formats import (
    FORMATS,
    Format,
    from_weights2weights,
    load,
    read_layout,
    save,
    to_bytes,
    to_weights2weights,
)
from lora_diffusion.lora.layout import LoRALayout

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "downsamplers.0.conv")
RANKS_ALPHAS = pytest.mark.parametrize(("rank", "alpha"), [(1, 27.0), (4, 2.5)])
ALL_FORMATS = pytest.mark.parametrize("format", FORMATS)


def make_layout(rank: int = 1, alpha: float = 27.0, targets: tuple[str, ...] = TARGETS) -> LoRALayout:
    return LoRALayout.from_unet(tiny_unet(), rank=rank, target_modules=targets, alpha=alpha)


def random_vector(layout: LoRALayout, seed: int = 0) -> Tensor:
    """Large enough that a render shows it, whatever the scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.size, generator=generator) * (0.05 / layout.scale) ** 0.5


@pytest.fixture(scope="module")
def pipe_module() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture
def pipe(pipe_module: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    yield pipe_module
    pipe_module.unload_lora_weights()


def draw_with_bank(pipe: StableDiffusionPipeline, layout: LoRALayout, vector: Tensor) -> Tensor:
    with LoRABank(pipe.unet, layout).active(vector[None], samples_per_identity=2):
        return draw(pipe)


def forward(unet: UNet2DConditionModel | PeftModel) -> Tensor:
    """In float64, so that equality is told from rounding, which scale 27 magnifies."""
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return unet.double()(latents.double(), 500, states.double()).sample


def forward_with_bank(layout: LoRALayout, vector: Tensor) -> Tensor:
    unet = tiny_unet().double()
    with LoRABank(unet, layout).active(vector[None], samples_per_identity=2):
        return forward(unet)


def assert_same_and_not_base(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5)
    assert (ours - base).abs().max() > 1e-2  # The LoRA does something, so equality says something.


# --- what others load


@RANKS_ALPHAS
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_pipeline_with_loaded_file_draws_what_the_bank_draws(
    pipe: StableDiffusionPipeline, tmp_path: Path, rank: int, alpha: float, format: Format, as_folder: bool
) -> None:
    layout = make_layout(rank, alpha)
    vector = random_vector(layout)
    base, ours = draw(pipe), draw_with_bank(pipe, layout, vector)
    file = save(vector, layout, tmp_path if as_folder else tmp_path / "person.safetensors", format)
    pipe.load_lora_weights(tmp_path if as_folder else file)
    assert_same_and_not_base(ours, draw(pipe), base)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_pipeline_swaps_people_in_place(pipe: StableDiffusionPipeline, tmp_path: Path, format: Format) -> None:
    """`hotswap` puts a second person where the first was, as a compiled pipeline needs it."""
    layout = make_layout(2, 7.0)
    people = [random_vector(layout, seed) for seed in (0, 1)]
    base, ours = draw(pipe), draw_with_bank(pipe, layout, people[1])
    for i, vector in enumerate(people):
        save(vector, layout, tmp_path / f"{i}.safetensors", format)
    pipe.load_lora_weights(tmp_path / "0.safetensors", adapter_name="person")
    pipe.load_lora_weights(tmp_path / "1.safetensors", adapter_name="person", hotswap=True)
    assert_same_and_not_base(ours, draw(pipe), base)


@RANKS_ALPHAS
def test_peft_model_from_folder_computes_what_the_bank_computes(tmp_path: Path, rank: int, alpha: float) -> None:
    layout = make_layout(rank, alpha)
    vector = random_vector(layout)
    folder = save(vector, layout, tmp_path / "person", "peft")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = forward(PeftModel.from_pretrained(tiny_unet(), folder))
    assert_same_and_not_base(forward_with_bank(layout, vector), loaded, forward(tiny_unet()))


@RANKS_ALPHAS
def test_kohya_file_merged_by_its_definition_computes_what_the_bank_computes(
    tmp_path: Path, rank: int, alpha: float
) -> None:
    """A1111 and ComfyUI: weight += alpha / rank * up @ down, found by the module's name with underscores."""
    layout = make_layout(rank, alpha, (*TARGETS, "ff.net.2"))
    vector = random_vector(layout)
    tensors = load_file(save(vector, layout, tmp_path / "person.safetensors", "kohya"))
    unet = tiny_unet()
    for name, module in unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.lora_down.weight" in tensors:
            down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
            update = torch.einsum("or,r...->o...", up.flatten(1), down)
            module.weight += tensors.pop(f"{key}.alpha").item() / down.shape[0] * update
    assert not tensors
    assert_same_and_not_base(forward_with_bank(layout, vector), forward(unet), forward(tiny_unet()))


def test_kohya_keys_of_sd15_are_those_that_users_know(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    layout = LoRALayout.from_unet(unet, rank=1, target_modules=("to_q", "to_v"), alpha=27.0)
    with safe_open(save(random_vector(layout), layout, tmp_path, "kohya"), "pt") as file:
        keys = set(file.keys())
        assert len(keys) == 64 * 3
        module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"} <= keys
        assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora_up.weight" in keys
        assert file.get_tensor(f"{module}.alpha").item() == 27.0
        assert file.get_tensor(f"{module}.lora_down.weight").shape == (1, 320)


# --- there and back


@ALL_FORMATS
@RANKS_ALPHAS
def test_round_trip_is_exact(tmp_path: Path, format: Format, rank: int, alpha: float) -> None:
    layout = make_layout(rank, alpha)
    vector = random_vector(layout)
    assert torch.equal(load(save(vector, layout, tmp_path / "a", format), layout), vector)
    assert torch.equal(load(save(vector.numpy(), layout, tmp_path / "b", format), layout), vector)


@ALL_FORMATS
def test_half_precision_round_trip_keeps_every_half(tmp_path: Path, format: Format) -> None:
    layout = make_layout(alpha=0.1)
    vector = random_vector(layout)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load(save(vector, layout, tmp_path / str(dtype), format, dtype=dtype), layout)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, vector.to(dtype).float())


@ALL_FORMATS
def test_bytes_are_the_saved_file_and_always_the_same(tmp_path: Path, format: Format) -> None:
    layout = make_layout()
    vector = random_vector(layout)
    metadata = {"identity": "Zoë", "base_model": "tiny-sd"}
    data = to_bytes(vector, layout, format, metadata=metadata)
    assert data == to_bytes(vector.clone(), layout, format, metadata=metadata)
    path = save(vector, layout, tmp_path / "saved", format, metadata=metadata)
    if format == "peft":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                file.name: file.read_bytes() for file in path.iterdir()
            }
        path /= "adapter_model.safetensors"
    else:
        assert data == path.read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata() | metadata | {"layout_id": layout.layout_id, "format_version": "1"} == file.metadata()


def test_vector_file_knows_its_layout(tmp_path: Path) -> None:
    layout = make_layout(rank=4)
    vector = random_vector(layout)
    path = save(vector, layout, tmp_path, "vector")
    assert read_layout(path) == layout
    assert torch.equal(load(path), vector)


# --- what others wrote


@RANKS_ALPHAS
def test_files_that_others_wrote_are_read(tmp_path: Path, rank: int, alpha: float) -> None:
    """A LoRA that peft made, saved by peft and in each way that diffusers saves one, is one and the same vector."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=False)
    model = get_peft_model(tiny_unet(), config)
    state = get_peft_model_state_dict(model)
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}

    model.save_pretrained(tmp_path / "peft")
    adapted = tiny_unet()
    adapted.add_adapter(config)
    adapted.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in bare.items()}, strict=False)
    adapted.save_lora_adapter(tmp_path / "diffusers-unet")
    StableDiffusionPipeline.save_lora_weights(  # As diffusers' DreamBooth script does.
        tmp_path / "diffusers-script",
        unet_lora_layers=convert_state_dict_to_diffusers(bare),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    kohya = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in bare.items()})
    (tmp_path / "kohya").mkdir()
    save_file(
        {key: torch.tensor(alpha) if key.endswith("alpha") else tensor for key, tensor in kohya.items()},
        tmp_path / "kohya" / "any name.safetensors",
    )

    layout = make_layout(rank, alpha)
    for writer in ("peft", "diffusers-unet", "diffusers-script", "kohya"):
        vector = load(tmp_path / writer, layout)
        assert torch.equal(vector, torch.cat([state[key].flatten() for key in sorted(state)])), writer
    torch.testing.assert_close(forward_with_bank(layout, vector), forward(model), rtol=0, atol=1e-5)


def test_weights2weights_row_is_sorted_peft_tensors_with_alpha_27(tmp_path: Path) -> None:
    config = LoraConfig(r=1, lora_alpha=27, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model = get_peft_model(tiny_unet(), config)
    state = get_peft_model_state_dict(model)
    row = torch.cat([state[key].flatten() for key in sorted(state)])
    layout = make_layout(1, 27.0, ("to_q", "to_v"))
    vector = from_weights2weights(row.bfloat16(), layout)
    assert torch.equal(vector, row.bfloat16().float())
    assert torch.equal(to_weights2weights(vector, layout), vector)
    vector = from_weights2weights(row, layout)
    torch.testing.assert_close(forward_with_bank(layout, vector), forward(model), rtol=0, atol=1e-5)

    other = make_layout(1, 1.0, ("to_q", "to_v"))
    with pytest.raises(ValueError, match="rescale=True"):
        from_weights2weights(row, other)
    rescaled = from_weights2weights(row, other, rescale=True)
    torch.testing.assert_close(forward_with_bank(other, rescaled), forward(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(to_weights2weights(rescaled, other, rescale=True), row)

    # Their exporter leaves the adapter's name in the keys.
    model.save_pretrained(tmp_path)
    named = {key.replace(".weight", ".identity1.weight"): tensor for key, tensor in state.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    assert torch.equal(load(tmp_path, layout), row)


@pytest.mark.parametrize("format", FORMATS)
def test_another_alpha_is_folded_into_B(tmp_path: Path, format: Format) -> None:
    theirs, ours = make_layout(4, 27.0), make_layout(4, 2.0)
    vector = random_vector(theirs)
    loaded = load(save(vector, theirs, tmp_path / "file", format), ours)
    torch.testing.assert_close(forward_with_bank(ours, loaded), forward_with_bank(theirs, vector))


def test_file_without_alpha_means_alpha_equal_to_rank(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """The convention of diffusers and kohya."""
    layout = make_layout(4, 4.0)
    vector = random_vector(layout)
    for format in ("diffusers", "kohya"):
        tensors = load_file(save(vector, layout, tmp_path / format, format))
        save_file({k: v for k, v in tensors.items() if not k.endswith(".alpha")}, tmp_path / f"{format}.safetensors")
        assert torch.equal(load(tmp_path / f"{format}.safetensors", layout), vector)
        ours = draw_with_bank(pipe, layout, vector)
        pipe.load_lora_weights(tmp_path / f"{format}.safetensors")
        torch.testing.assert_close(draw(pipe), ours, rtol=1e-4, atol=2e-5)
        pipe.unload_lora_weights()


# --- what is refused


@ALL_FORMATS
def test_a_flipped_bit_is_noticed(tmp_path: Path, format: Format) -> None:
    layout = make_layout()
    save(random_vector(layout), layout, tmp_path, format)
    file = next(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    for at in (-1, -len(data) // 3, 8 + int.from_bytes(data[:8], "little")):
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged: .* another checksum"):
            load(tmp_path, layout)
        data[at] ^= 1


def test_pickles_and_other_files_are_never_loaded(tmp_path: Path) -> None:
    layout = make_layout()
    torch.save({"vector": random_vector(layout)}, tmp_path / "lora.pt")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("not a LoRA at all")
    for name in ("lora.pt", "empty.safetensors", "text.safetensors"):
        with pytest.raises(ValueError, match=r"not a safetensors file.*never loaded"):
            load(tmp_path / name, layout)
    with pytest.raises(ValueError, match=r"should hold one LoRA.*empty.*text"):
        load(tmp_path, layout)
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nobody", layout)


@ALL_FORMATS
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, format: Format) -> None:
    layout = make_layout()
    vector = random_vector(layout)
    path = save(vector, layout, tmp_path / "person", format)
    before = sorted(file.name for file in (tmp_path / "person").iterdir())
    with pytest.raises(ValueError, match="NaN or infinite"):
        save(vector.index_fill(0, torch.tensor([5]), torch.nan), layout, tmp_path / "person", format)
    with pytest.raises(ValueError, match=r"as torch\.float16"):
        save(vector + 1e5, layout, tmp_path / "person", format, dtype=torch.float16)
    assert sorted(file.name for file in (tmp_path / "person").iterdir()) == before
    assert torch.equal(load(path, layout), vector)


def test_misuse_is_explained(tmp_path: Path) -> None:
    layout = make_layout()
    vector = random_vector(layout)
    with pytest.raises(ValueError, match="diffusers, peft, kohya, vector"):
        save(vector, layout, tmp_path, "webui")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"expects floats of shape \({layout.size},\)"):
        save(vector[None], layout, tmp_path)
    with pytest.raises(ValueError, match="wants a folder"):
        save(vector, layout, tmp_path / "a.safetensors", "peft")
    for name in ("ada.bin", "ada.pt", "ada.ckpt", "ada.safetensor", "ada.zip"):
        with pytest.raises(ValueError, match=rf"{name}: a LoRA is written as .safetensors"):
            save(vector, layout, tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"\['layout_id'\] are taken"):
        save(vector, layout, tmp_path, metadata={"layout_id": "mine"})
    with pytest.raises(ValueError, match="pass the one of your UNet"):
        load(save(vector, layout, tmp_path / "b"))
    with pytest.raises(ValueError, match="no layout in its header"):
        read_layout(tmp_path / "b")
