"""A LoRA file that describes layers we have loads, whatever dialect names them; one that does not is told what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_unet import tiny_unet
from torch import Tensor

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.dialects import spellings, stability_names
from lora_diffusion.lora.formats import layout_of, load, read, save
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.known_unets import meta_unet

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj",
           "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "time_embedding.linear_1")  # fmt: skip
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def make_layout(rank: int = 2, alpha: float = 3.0, targets: tuple[str, ...] = TARGETS) -> LoRALayout:
    return LoRALayout.from_unet(tiny_unet(), rank=rank, target_modules=targets, alpha=alpha)


LAYOUT = make_layout()


def random_vector(layout: LoRALayout = LAYOUT, seed: int = 0) -> Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


def pairs_of(vector_N: Tensor, layout: LoRALayout = LAYOUT) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer in the shapes of files."""
    tensors = {}
    for entry, (A, B) in zip(layout.entries, layout.split(vector_N[None]).values(), strict=True):
        inputs, (outputs, *ones) = entry.weight_shapes
        tensors[entry.name] = A[0].reshape(-1, *inputs).clone(), B[0].reshape(outputs, -1, *ones).clone()
    return tensors


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def spelled(pairs: Pairs, stem: Callable[[str], str], A: str, B: str, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {stem(name) + A: a, stem(name) + B: b}
        tensors |= {f"{stem(name)}.alpha": torch.tensor(alpha)} if alpha else {}
    return tensors


def old(name: str) -> str:
    return name.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")


def ldm(name: str) -> str:
    return stability_names(name, 1)[-1]  # the tiny UNet has one resnet a block


def flat(name: str) -> str:
    return name.replace(".", "_")


DOWN_UP, AB = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
DIALECTS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "ComfyUI, down and up": (lambda name: f"diffusion_model.{ldm(name)}", *DOWN_UP),
    "ComfyUI, A and B": (lambda name: f"diffusion_model.{ldm(name)}", *AB),
    "kohya, Stability's names": (lambda name: f"lora_unet_{flat(ldm(name))}", *DOWN_UP),
    "kohya, diffusers' names": (lambda name: f"lora_unet_{flat(name)}", *DOWN_UP),
    "SimpleTuner": (lambda name: f"lycoris_{flat(name)}", *DOWN_UP),
    "diffusers before 0.18": (lambda name: f"unet.{old(name)}", "_lora.down.weight", "_lora.up.weight"),
    "diffusers' attention processors": (old, "_lora.down.weight", "_lora.up.weight"),
    "diffusers' scripts": (lambda name: f"unet.{name}", ".lora.down.weight", ".lora.up.weight"),
    "a linear layer's": (lambda name: f"unet.{name}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "peft in training": (lambda name: name, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft in training, prefix": (lambda name: f"unet.{name}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "without .weight": (lambda name: f"unet.{name}", ".lora_A", ".lora_B"),
    "compiled": (lambda name: f"_orig_mod.{name}", *AB),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_numbers(tmp_path: Path, dialect: str) -> None:
    vector, layout = random_vector(), make_layout(alpha=2.0)
    stem, A, B = DIALECTS[dialect]
    path = write(spelled(pairs_of(vector), stem, A, B), tmp_path / "x.safetensors")
    assert torch.equal(load(path, layout), vector)  # no alpha: alpha = rank
    path = write(spelled(pairs_of(vector), stem, A, B, alpha=3.0), tmp_path / "x.safetensors")
    assert torch.equal(load(path, LAYOUT), vector)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_stabilitys_names_are_those_of_diffusers_own_converter(family: str) -> None:
    unet = meta_unet(family)
    names = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    names = [name for name in names if not name.startswith("conv_norm_out") and ".norm" not in name]
    spelled = {other: name for name in names for other in stability_names(name, 2)}
    assert set(spelled.values()) == set(names)
    assert all(spellings(tuple(names))[flat(other)] == name for other, name in spelled.items())
    wanted = [(other, name, end) for other, name in spelled.items() for end in ("weight", "bias")]
    checkpoint = {f"model.diffusion_model.{other}.{end}": f"{name}.{end}" for other, name, end in wanted}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert converted == {f"{name}.{end}": f"{name}.{end}" for _, name, end in wanted}


def test_a_file_for_sdxl_has_the_names_of_kohyas_trainer_at_full_size(tmp_path: Path) -> None:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "downsamplers.0.conv", "upsamplers.0.conv")
    layout = LoRALayout.from_unet(meta_unet("sdxl"), rank=1, alpha=2.0, target_modules=targets)
    vector = random_vector(layout)
    path = save(vector, layout, tmp_path / "x.safetensors", "kohya")
    layers = {key.split(".")[0] for key in load_file(path)}
    assert len(layers) == len(layout.entries)
    # as in files that people train: sd-scripts, networks/lora.py over library/sdxl_original_unet.py
    assert layers > {
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_middle_block_2_in_layers_2",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v",
        "lora_unet_output_blocks_8_0_in_layers_2",
    }
    assert not any("down_blocks" in layer or "up_blocks" in layer or "mid_block" in layer for layer in layers)
    assert torch.equal(load(path, layout), vector)


def test_shapes_that_hold_the_same_numbers_are_the_same(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 has 1 x 1 convolutions where SDXL has linear layers; trainers write either as the other."""
    vector = random_vector()
    as_matrix = {name: (A.flatten(1), B.flatten(1)) for name, (A, B) in pairs_of(vector).items()}
    as_filters = {
        name: (A if A.ndim == 4 else A[:, :, None, None], B if B.ndim == 4 else B[:, :, None, None])
        for name, (A, B) in pairs_of(vector).items()
    }
    for pairs in (as_matrix, as_filters):
        path = write(
            spelled(pairs, lambda name: f"lora_unet_{flat(name)}", *DOWN_UP, alpha=3.0), tmp_path / "x.safetensors"
        )
        assert torch.equal(load(path, LAYOUT), vector)


# --- fewer layers, and more


def test_fewer_layers_load_if_asked_and_are_named(tmp_path: Path) -> None:
    few = make_layout(targets=("to_q", "conv1"))
    vector = random_vector(few)
    for format in ("kohya", "vector"):
        path = save(vector, few, tmp_path / f"{format}.safetensors", format)
        with pytest.raises(ValueError, match=r"does not describe \d+ of the .* conv_in, .*partial=True"):
            load(path, LAYOUT)
        loaded = read(path, LAYOUT, partial=True)
        assert set(loaded.missing) == {e.name for e in LAYOUT.entries} - {e.name for e in few.entries}
        with pytest.warns(UserWarning, match="layers are not in the file and do nothing: conv_in"):
            assert torch.equal(load(path, LAYOUT, partial=True), loaded.vector_N)
        for name, (A, B) in LAYOUT.split(loaded.vector_N[None]).items():
            expected = few.split(vector[None]).get(name)
            assert torch.equal(A, expected[0] if expected else A * 0)
            assert torch.equal(B, expected[1] if expected else B * 0)


def test_more_layers_load_if_asked_and_are_described(tmp_path: Path) -> None:
    few, text = make_layout(targets=("to_q",)), torch.zeros(2, 8)
    vector = random_vector(few)
    tensors = load_file(save(random_vector(), LAYOUT, tmp_path / "x.safetensors", "kohya"))
    tensors |= spelled(pairs_of(vector, few), lambda name: f"lora_unet_{flat(name)}", *DOWN_UP)
    for side in ("down", "up"):
        tensors[f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{side}.weight"] = text.clone()
    tensors["something.else"] = text.clone()
    path = write(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds more than layout") as refused:
        load(path, few)
    for text in ("layers of the UNet outside of the layout (", "attn1_to_k", "1 layers of the text encoder (mlp_fc1)",
                 "1 unknown tensors ('something.else')", "ignore_extra=True"):  # fmt: skip
        assert text in str(refused.value)
    with pytest.warns(UserWarning, match="left out, as the layout has no place for it: .*text encoder"):
        assert torch.equal(load(path, few, ignore_extra=True), vector)
    path = save(random_vector(), LAYOUT, tmp_path / "v.safetensors", "vector")
    with pytest.raises(ValueError, match=r"holds more than layout .*conv_in.*ignore_extra=True"):
        load(path, few)
    assert read(path, few, ignore_extra=True).ignored


# --- other models and other kinds


def any_lora(unet: UNet2DConditionModel, targets: tuple[str, ...], path: Path) -> Path:
    layout = LoRALayout.from_unet(unet, rank=1, target_modules=targets)
    return Path(save(torch.zeros(layout.size), layout, path, "kohya"))


FAMILY = {"sd1": r"Stable Diffusion 1\.x", "sd2": r"Stable Diffusion 2\.x", "sdxl": "Stable Diffusion XL"}


@pytest.mark.parametrize(("theirs", "ours"), [("sdxl", "sd1"), ("sd2", "sd1"), ("sd1", "sdxl"), ("sd1", "sd2")])
@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")])
def test_a_lora_of_another_family_is_told_so(tmp_path: Path, theirs: str, ours: str, targets: tuple[str, ...]) -> None:
    path = any_lora(meta_unet(theirs), targets, tmp_path / "x.safetensors")
    layout = LoRALayout.from_unet(meta_unet(ours), rank=1, target_modules=targets)
    with pytest.raises(ValueError, match=f"is a LoRA for {FAMILY[theirs]}; layout .* is one of {FAMILY[ours]}"):
        load(path, layout, partial=True, ignore_extra=True)


SQUARE, TEXT = torch.zeros(4, 4), "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
OTHERS = {
    "FLUX": "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight",
    "FLUX ": "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "Stable Diffusion 3": "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",
    "a transformer .*not a UNet": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "a language model": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "Stable Cascade": "lora_prior_unet_down_0.lora_down.weight",
    "Stable Diffusion XL": f"{TEXT}.lora_down.weight",
}


@pytest.mark.parametrize("model", OTHERS)
def test_a_lora_of_a_model_without_our_layers_is_told_so(tmp_path: Path, model: str) -> None:
    path = write({OTHERS[model]: SQUARE}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"is a LoRA for {model.strip()}"):
        load(path, LAYOUT, partial=True, ignore_extra=True)


LAYER = f"lora_unet_{flat(LAYOUT.entries[3].name)}"
KINDS = {
    "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "LoKr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
    "DoRA": ["lora_down.weight", "lora_up.weight", "dora_scale"],
    r"\(IA\)³": ["weight", "on_input"],
    r"full difference \(\.diff\)": ["diff", "diff_b"],
    "OFT": ["oft_blocks"],
    "GLoRA": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "LoCon with a core": ["lora_down.weight", "lora_mid.weight", "lora_up.weight"],
    "LoRA with biases": ["lora_A.weight", "lora_B.weight", "lora_B.bias"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [LAYER, "diffusion_model.input_blocks.99.1.proj_in"])
def test_a_file_of_another_kind_is_told_so(tmp_path: Path, kind: str, layer: str) -> None:
    path = write({f"{layer}.{suffix}": SQUARE.clone() for suffix in KINDS[kind]}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=kind):
        load(path, LAYOUT, partial=True, ignore_extra=True)


@pytest.mark.parametrize(("changes", "kind"), [
    ({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "LoRA with biases"), ({"peft_type": "LOHA"}, "LOHA"),
    ({"lora_alpha": "much"}, "lora_alpha 'much'"), ({"lora_alpha": None}, "None; expected"), ({"alpha_pattern": 3}, "alpha '3';"),
])  # fmt: skip
def test_a_config_of_another_kind_is_told_so(tmp_path: Path, changes: dict[str, object], kind: str) -> None:
    folder = Path(save(random_vector(), LAYOUT, tmp_path / "x", "peft"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=kind):
        load(folder, LAYOUT)


def test_what_is_no_lora_is_told_what_it_is(tmp_path: Path) -> None:
    for key, what in (
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole model, not a LoRA"),
        ("emb_params", "a textual inversion"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("somewhat", "Its tensors: 'somewhat'"),
    ):
        path = write({key: SQUARE}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"holds no LoRA.*{what}"):
            load(path, LAYOUT)


# --- ranks and scales


def update(layout: LoRALayout, vector: Tensor) -> dict[str, Tensor]:
    """scale B A of each layer."""
    return {name: layout.scale * (B[0].double() @ A[0].double()) for name, (A, B) in layout.split(vector[None]).items()}


def assert_same_update(layout: LoRALayout, vector: Tensor, other: LoRALayout, expected: Tensor) -> None:
    for name, ours in update(layout, vector).items():
        torch.testing.assert_close(ours, update(other, expected)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "vector"])
def test_a_lower_rank_is_padded_and_the_update_stays(tmp_path: Path, format: str) -> None:
    low = make_layout(rank=1, alpha=5.0)
    vector = random_vector(low)
    loaded = load(save(vector, low, tmp_path / "x", format), LAYOUT)  # type: ignore[arg-type]
    assert_same_update(LAYOUT, loaded, low, vector)


def test_ranks_and_alphas_that_differ_by_layer_are_folded_into_the_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    for i, entry in enumerate(LAYOUT.entries):
        rank, alpha = 1 + i % 2, 0.5 + i
        A, B = (
            torch.randn(rank, entry.in_features, generator=generator),
            torch.randn(entry.out_features, rank, generator=generator),
        )
        stem = f"lora_unet_{flat(entry.name)}"
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(alpha)}
        expected[entry.name] = (alpha / rank * B @ A).double()
    loaded = update(LAYOUT, load(write(tensors, tmp_path / "x.safetensors"), LAYOUT))
    for name, ours in loaded.items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-5, atol=1e-5)


def test_a_higher_rank_is_cut_by_svd_if_asked_and_says_what_was_kept(tmp_path: Path) -> None:
    high = make_layout(rank=5, alpha=5.0)
    vector = random_vector(high)
    path = save(vector, high, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"has rank 5, layout .* has 2: load it with svd=True, which keeps (\d\d\.\d)%"
    ):
        load(path, LAYOUT)
    loaded = read(path, LAYOUT, svd=True)
    kept, whole = [], []
    for name, ours in update(LAYOUT, loaded.vector_N).items():
        U, s, Vt = torch.linalg.svd(update(high, vector)[name], full_matrices=False)
        torch.testing.assert_close(ours, U[:, :2] * s[:2] @ Vt[:2], rtol=1e-3, atol=1e-3)
        kept.append(s[:2].square().sum())
        whole.append(s.square().sum())
    assert math.isclose(loaded.energy, sum(kept) / sum(whole), rel_tol=1e-5)
    with pytest.warns(UserWarning, match=rf"{loaded.energy:.1%} of the update's energy was kept"):
        load(path, LAYOUT, svd=True)


def test_a_higher_rank_that_holds_no_more_than_the_layout_loses_nothing(
    tmp_path: Path,
) -> None:
    high, vector = make_layout(rank=6, alpha=4.0), random_vector()
    padded = load(save(vector, LAYOUT, tmp_path / "x.safetensors"), high)
    again = read(save(padded, high, tmp_path / "y.safetensors"), LAYOUT, svd=True)
    assert again.energy == pytest.approx(1, abs=1e-5)
    assert_same_update(LAYOUT, again.vector_N, LAYOUT, vector)


@pytest.mark.parametrize("changes", [
    {"alpha_pattern": {"to_k": 7.0, "mid_block.attentions.0.proj_in": 0.5}}, {"rank_pattern": {"to_k": 1}}, {"use_rslora": True},
])  # fmt: skip
def test_pefts_patterns_and_rank_stabilised_lora_are_what_peft_makes_of_them(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    config = LoraConfig(r=2, lora_alpha=3.0, target_modules=list(TARGETS), init_lora_weights=False, **changes)
    torch.manual_seed(0)
    model = get_peft_model(tiny_unet(), config)
    model.save_pretrained(tmp_path)
    vector = load(tmp_path, LAYOUT)
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    unet = tiny_unet()
    with torch.no_grad(), LoRABank(unet, LAYOUT).active(vector[None], samples_per_identity=1):
        ours = unet(x, 500, states).sample
        torch.testing.assert_close(ours, model(x, 500, states).sample, rtol=1e-3, atol=1e-3)


def test_a_peft_file_without_its_config_takes_the_alpha_given_or_warns(tmp_path: Path) -> None:
    vector = random_vector()
    path = Path(save(vector, LAYOUT, tmp_path, "peft")) / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(load(path, LAYOUT, alpha=3.0), vector)
    with pytest.warns(UserWarning, match="says alpha: taken as the rank; if not, pass alpha="):
        assert torch.equal(load(path, make_layout(alpha=2.0)), vector)


# --- what is broken


def test_a_file_that_was_cut_or_doubled_is_named(tmp_path: Path) -> None:
    whole = load_file(save(random_vector(), LAYOUT, tmp_path / "x.safetensors"))
    first = f"lora_unet_{flat(LAYOUT.entries[0].name)}"
    for changes, message in (
        ({f"{first}.lora_up.weight": None}, f"has no B for {LAYOUT.entries[0].name}: the file was cut"),
        ({f"unet.{LAYOUT.entries[0].name}.lora_A.weight": torch.zeros(2, 3)}, "has two tensors for A"),
        ({f"{first}.lora_down.weight": torch.zeros(2, 5)}, r"has A float32 \(2, 5\) .*expected \(rank, "),
        ({f"{first}.lora_down.weight": torch.zeros(7)}, r"has A float32 \(7,\)"),
        ({f"{first}.lora_up.weight": torch.zeros(32, 3, 1, 1)}, r"and B float32 \(32, 3, 1, 1\)"),
        ({f"{first}.lora_down.weight": whole[f"{first}.lora_down.weight"].long()}, "has A int64"),
        ({f"{first}.alpha": torch.tensor([1.0, 2.0])}, "an alpha that is not one finite number"),
        ({f"{first}.alpha": torch.tensor(torch.nan)}, "an alpha that is not one finite number"),
        ({f"{first}.lora_down.weight": whole[f"{first}.lora_down.weight"] * torch.inf}, "NaN or infinite"),
    ):
        tensors = {key: tensor for key, tensor in {**whole, **changes}.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            load(write(tensors, tmp_path / "y.safetensors"), LAYOUT)


def test_any_bytes_give_a_vector_or_one_of_our_errors(tmp_path: Path) -> None:
    """Headers are changed as text, so that the damage reaches our own code, and not only the library's first check."""
    layout, nameless = make_layout(targets=("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)), []
    rng, path = torch.Generator().manual_seed(0), tmp_path / "adapter_model.safetensors"

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for layout_or_none in (layout, None):
            try:
                load(path, layout_or_none)
            except ValueError as error:
                nameless.extend([] if str(tmp_path) in str(error) else [str(error)])

    pieces = [b"F16", b"BF16", b"I64", b"F8_E4M3", b"F4", b"BOOL", b"C64", b"[", b"]", b"{", b"}", b"-1", b"1e9", b"null", b"0",
              b'"', b"99999999999999999999", b"\\ud800", b"[" * 2000, b"lora_B", b"alpha", b".diff", b"unet."]  # fmt: skip
    for format in ("diffusers", "peft", "kohya", "vector"):
        save(random_vector(layout), layout, tmp_path / format, format)  # type: ignore[arg-type]
        whole = next((tmp_path / format).glob("*.safetensors")).read_bytes()
        if format == "peft":
            (tmp_path / "adapter_config.json").write_bytes((tmp_path / "peft/adapter_config.json").read_bytes())
        length = int.from_bytes(whole[:8], "little")
        for _ in range(100):
            header = bytearray(whole[8 : 8 + length])
            for _ in range(1 + pick(3)):
                at, piece = pick(len(header)), pieces[pick(len(pieces))]
                header[at : at + (0, len(piece))[pick(2)]] = piece
            check(len(header).to_bytes(8, "little") + header + whole[8 + length :])
            data = bytearray(whole)
            data[pick(len(data))] ^= 1 << pick(8)
            check(data[: pick(len(data))] if pick(4) == 0 else data)
    config = (tmp_path / "peft/adapter_config.json").read_bytes()
    path.write_bytes((tmp_path / "peft/adapter_model.safetensors").read_bytes())
    for text in (
        b"[]",
        b"{",
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"lora_alpha": true}',
        b'{"alpha_pattern": {"to_q": []}}',
        config[:40],
    ):
        (tmp_path / "adapter_config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"JSON|lora_alpha"):
            load(path, layout)
    assert not nameless


# --- a layout for a file


def test_a_files_own_layout_on_a_unet_loses_nothing(tmp_path: Path) -> None:
    few = make_layout(rank=3, alpha=5.0, targets=("to_q", "conv1"))
    vector = random_vector(few)
    for format in ("kohya", "diffusers", "peft", "vector"):
        path = save(vector, few, tmp_path / format, format)  # type: ignore[arg-type]
        assert layout_of(path, tiny_unet()).layout_id == few.layout_id
        assert torch.equal(load(path, layout_of(path, tiny_unet())), vector)
