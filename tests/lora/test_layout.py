"""The layout is the contract between fine-tuning, corpus and exports: order, offsets and id must never move."""

import dataclasses
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_unet import TINY

from lora_diffusion.lora.layout import LoRALayout


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**TINY)


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def test_sd15_rank_1_is_the_vector_of_weights2weights(sd15: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(sd15, rank=1, target_modules=("to_q", "to_v"), alpha=27)
    assert layout.size == 99_648
    assert len(layout.entries) == 64
    assert layout.scale == 27
    offsets = [(e.name.split("transformer_blocks.0.")[1], e.offset_A, e.offset_B) for e in layout.entries[:4]]
    assert offsets == [
        ("attn1.to_q", 0, 320),
        ("attn1.to_v", 640, 960),
        ("attn2.to_q", 1280, 1600),
        ("attn2.to_v", 1920, 2688),
    ]
    assert layout.entries[3].in_features == 768
    blocks = [entry.name.split("_")[0] for entry in layout.entries]
    assert sorted(set(blocks), key=blocks.index) == ["down", "mid", "up"]


def test_order_is_the_lexicographic_order_of_peft_keys(sd15: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(sd15, target_modules=("to_out.0", "to_v", "to_q", "ff.net.2", "ff.net.0.proj"))
    keys = [f"{e.name}.lora_{ab}.weight" for e in layout.entries for ab in "AB"]
    assert keys == sorted(keys)
    spans = [(e.offset_A, e.offset_B) for e in layout.entries]
    flat = [offset for span in spans for offset in span]
    assert flat == sorted(flat)
    ends = [*flat[1:], layout.size]
    assert [end - start for start, end in zip(flat, ends, strict=True)] == list(layout.split_sizes)


def test_block_numbers_sort_as_strings() -> None:
    layout = LoRALayout.from_shapes(
        {f"blocks.{i}.to_q": (2, 2) for i in range(12)}, rank=1, alpha=1, target_modules=["to_q"]
    )
    assert [e.name.split(".")[1] for e in layout.entries][:4] == ["0", "1", "10", "11"]


@pytest.mark.parametrize("rank", [1, 4])
def test_vector_holds_A_and_B_row_by_row_at_their_offsets(unet: UNet2DConditionModel, rank: int) -> None:
    layout = LoRALayout.from_unet(unet, rank=rank)
    vectors_KN = torch.arange(3 * layout.size, dtype=torch.float64).view(3, -1)
    for entry in layout.entries:
        A_KRI, B_KOR = layout.split(vectors_KN)[entry.name]
        assert A_KRI.shape == (3, rank, entry.in_features)
        assert B_KOR.shape == (3, entry.out_features, rank)
        start = 2 * layout.size
        assert A_KRI[2].flatten().tolist() == list(range(start + entry.offset_A, start + entry.offset_B))
        assert B_KOR[2, 1, 0] == start + entry.offset_B + rank


@pytest.mark.parametrize("rank", [1, 4])
def test_split_and_join_are_inverse_and_split_copies_nothing(unet: UNet2DConditionModel, rank: int) -> None:
    layout = LoRALayout.from_unet(unet, rank=rank)
    vectors_KN = torch.randn(5, layout.size)
    parts = layout.split(vectors_KN)
    assert torch.equal(layout.join(parts), vectors_KN)
    assert all(
        t.untyped_storage().data_ptr() == vectors_KN.untyped_storage().data_ptr() for ab in parts.values() for t in ab
    )


def test_gradient_flows_through_split_to_its_own_place(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet, rank=2)
    vectors_KN = torch.zeros(2, layout.size, requires_grad=True)
    entry = layout.entries[3]
    A_KRI, _ = layout.split(vectors_KN)[entry.name]
    A_KRI[1].sum().backward()
    expected = torch.zeros(2, layout.size)
    expected[1, entry.offset_A : entry.offset_B] = 1
    assert torch.equal(vectors_KN.grad, expected)


def test_mask_B_marks_the_B_matrices(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet, rank=2)
    parts = layout.split(layout.mask_B()[None])
    assert all(not A.any() and B.all() for A, B in parts.values())


def test_layout_survives_json(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet, rank=4, alpha=3)
    assert LoRALayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_layout_id_names_what_a_vector_means(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet)
    assert len(layout.layout_id) == 16
    assert int(layout.layout_id, 16) >= 0
    same = LoRALayout.from_unet(unet, target_modules=("to_out.0", "to_q", "to_v", "to_k"))
    assert same.layout_id == layout.layout_id
    others = [
        LoRALayout.from_unet(unet, rank=2, alpha=2),
        LoRALayout.from_unet(unet, alpha=2),
        LoRALayout.from_unet(unet, target_modules=("to_q", "to_v")),
    ]
    assert len({other.layout_id for other in others} | {layout.layout_id}) == 4


def test_layout_id_never_moves(unet: UNet2DConditionModel) -> None:
    """Corpora on disk carry it: a change here orphans them, so it needs a new format version."""
    assert LoRALayout.from_unet(unet).layout_id == "f081d543f5dcbd63"


def test_edited_layout_is_refused(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet)
    for edit in (
        {"alpha": 2.0},
        {"modules": layout.to_dict()["modules"][1:]},
        {"modules": layout.to_dict()["modules"][::-1]},
    ):
        with pytest.raises(ValueError, match="edited by hand or cut"):
            LoRALayout.from_dict({**layout.to_dict(), **edit})
    with pytest.raises(ValueError, match="format version 99"):
        LoRALayout.from_dict({**layout.to_dict(), "format_version": 99})


def test_target_that_matches_nothing_is_named_with_what_would_match(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"'to_query' matches no module.*'to_out\.0'.*'to_q'"):
        LoRALayout.from_unet(unet, target_modules=("to_q", "to_query"))


def test_target_matches_whole_path_parts_only(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="'o_q' matches no module"):
        LoRALayout.from_unet(unet, target_modules=("o_q",))


def test_convolution_is_a_linear_layer_over_patches(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet, rank=2, target_modules=("conv1", "proj_in"))
    assert LoRALayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    kernels = {entry.kernel for entry in layout.entries}
    assert kernels == {(3, 3), (1, 1)}
    for entry in layout.entries:
        weight = unet.get_submodule(entry.name).weight
        assert (entry.out_features, entry.in_features) == weight.flatten(1).shape
        assert entry.weight_shapes == (weight.shape[1:], (weight.shape[0], 1, 1))
    flat = LoRALayout.from_shapes(
        {e.name: (e.in_features, e.out_features) for e in layout.entries},
        rank=2,
        alpha=layout.alpha,
        target_modules=layout.target_modules,
    )
    assert flat.size == layout.size
    assert flat.layout_id != layout.layout_id


def test_target_that_can_carry_no_lora_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"'norm1' matches .* a LayerNorm"):
        LoRALayout.from_unet(unet, target_modules=("norm1",))
    with pytest.raises(ValueError, match=r"'to_out' matches .* a ModuleList"):
        LoRALayout.from_unet(unet, target_modules=("to_out",))


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("alpha", 0.0), ("alpha", float("nan")), ("target_modules", ())]
)
def test_senseless_settings_are_refused(unet: UNet2DConditionModel, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        LoRALayout.from_unet(unet, **{field: value})  # type: ignore[arg-type]


def test_wrong_vectors_and_matrices_are_refused_with_shapes(unet: UNet2DConditionModel) -> None:
    layout = LoRALayout.from_unet(unet)
    with pytest.raises(ValueError, match=rf"\({layout.size},\).*\(K, {layout.size}\)"):
        layout.split(torch.zeros(layout.size))
    parts = layout.split(torch.zeros(1, layout.size))
    first = layout.entries[0].name
    with pytest.raises(ValueError, match="missing"):
        layout.join({name: ab for name, ab in parts.items() if name != first})
    with pytest.raises(ValueError, match="unknown"):
        layout.join({**parts, "new": parts[first]})
    with pytest.raises(ValueError, match=first):
        layout.join({**parts, first: (parts[first][0][:, :, 1:], parts[first][1])})


def test_layout_is_frozen(unet: UNet2DConditionModel) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRALayout.from_unet(unet).rank = 2  # type: ignore[misc]


def test_keys_are_sorted_and_not_names_and_a_kernel_keeps_its_height_and_width() -> None:
    """`a.lora_A.weight` comes after `a.b.lora_A.weight` and `a-b.lora_A.weight`."""
    shapes = dict.fromkeys(("a", "a.b", "a-b", "a.x"), (2, 2))
    layout = LoRALayout.from_shapes(shapes, rank=1, alpha=1, target_modules=["a"])
    assert [entry.name for entry in layout.entries] == ["a-b", "a.b", "a", "a.x"]
    tall, wide = (
        LoRALayout.from_shapes({"c": (4, 8, kernel)}, rank=1, alpha=1, target_modules=["c"])
        for kernel in ((3, 1), (1, 3))
    )
    assert tall.layout_id != wide.layout_id
    assert all(LoRALayout.from_dict(one.to_dict()) == one for one in (tall, wide))
