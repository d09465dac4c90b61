"""Base models as people have them: each is loaded without network and equal in every tensor, or refused with what it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ldm_names import ldm_checkpoint
from tiny_pipeline import tiny_pipeline
from tiny_xl import tiny_xl
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_diffusion.models.clip_tokenizer import clip_tokenizer
from lora_diffusion.models.loading import load_parts
from lora_diffusion.models.parts import check_finite
from lora_diffusion.models.stable_diffusion import BaseModel

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def narrow(second: bool, levels: int = 4) -> StableDiffusionPipeline:
    """The blocks and the vocabulary of Stable Diffusion 1.x or 2.x, at a fraction of their widths; random weights."""
    torch.manual_seed(0)
    widths = (64,) * levels
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=64,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        attention_head_dim=[width // 64 for width in widths] if second else 8,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
    )
    act = "gelu" if second else "quick_gelu"
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act=act,
    )
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = DDIMScheduler(**noise, prediction_type="v_prediction" if second else "epsilon")
    tokenizer = clip_tokenizer(**({"pad_token": "!"} if second else {}))
    return StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, None, False)


@pytest.fixture(scope="module")
def first() -> StableDiffusionPipeline:
    return narrow(second=False)


def same_tensors(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    left, right = got.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("second", [False, True], ids=["1.x", "2.x"])
def test_a_single_file_gives_every_tensor_of_the_pipeline_that_it_was_made_of(second: bool, tmp_path: Path) -> None:
    pipe = narrow(second)
    safetensors.torch.save_file(ldm_checkpoint(pipe, second), tmp_path / "model.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    base, of_folder = (BaseModel.from_pretrained(str(tmp_path / name)) for name in ("model.safetensors", "folder"))
    for got, expected in ((base.unet, pipe.unet), (base.vae, pipe.vae), (base.text_encoder, pipe.text_encoder)):
        same_tensors(got, expected)
    assert base.fingerprint == of_folder.fingerprint, "the same weights, noise levels and kind of prediction"
    words = ["a photo of sks person", "Zoë's 2nd photo, smiling!"]
    torch.testing.assert_close(base.encode_prompts(words), of_folder.encode_prompts(words))
    latents = torch.randn(1, 4, 16, 16)
    prompt = base.encode_prompts(words[:1])
    torch.testing.assert_close(base.unet(latents, 5, prompt).sample, pipe.unet(latents, 5, prompt).sample)
    assert (base.decode(latents) == of_folder.decode(latents)).all()
    assert base.image_size == (768 if second else 512)


def test_a_file_of_2x_is_asked_what_it_predicts_and_metadata_goes_first(tmp_path: Path) -> None:
    """A UNet that has learned to give back noise predicts noise: 2.x at 512 px, which has no other mark."""
    torch.manual_seed(0)
    pipe = narrow(second=True, levels=2)
    prompt = pipe.text_encoder(pipe.tokenizer([""], padding="max_length", return_tensors="pt").input_ids)[0].detach()
    optimizer = torch.optim.Adam(pipe.unet.parameters(), lr=4e-3)
    for _ in range(15):
        noise = torch.randn(2, 4, 8, 8)
        loss = (pipe.unet(noise, 999, prompt.expand(2, -1, -1)).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = ldm_checkpoint(pipe, second=True)
    safetensors.torch.save_file(tensors, tmp_path / "512.safetensors")
    base = BaseModel.from_pretrained(str(tmp_path / "512.safetensors"))
    assert (base.scheduler.config.prediction_type, base.image_size) == ("epsilon", 512)
    said = {"modelspec.prediction_type": "v", "modelspec.resolution": "640x640"}
    safetensors.torch.save_file(tensors, tmp_path / "said.safetensors", said)
    base = BaseModel.from_pretrained(str(tmp_path / "said.safetensors"))
    assert (base.scheduler.config.prediction_type, base.image_size) == ("v_prediction", 640)


def test_a_single_file_of_half_precision_without_the_inner_prefix_loads(
    first: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """As merging tools write them."""
    tensors = {k.replace("transformer.text_model.", "transformer."): v for k, v in ldm_checkpoint(first).items()}
    halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    safetensors.torch.save_file(halves, tmp_path / "merge.safetensors")
    base = BaseModel.from_pretrained(str(tmp_path / "merge.safetensors"), dtype=torch.bfloat16)
    assert {p.dtype for part in (base.unet, base.vae, base.text_encoder) for p in part.parameters()} == {torch.bfloat16}
    key = "conv_in.weight"
    assert torch.equal(base.unet.state_dict()[key], first.unet.state_dict()[key].half().bfloat16())


def test_a_pickle_is_refused_and_the_command_in_the_refusal_makes_a_file_that_loads(
    first: StableDiffusionPipeline, tmp_path: Path
) -> None:
    torch.save({"state_dict": ldm_checkpoint(first), "global_step": 7}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"it is a pickle \(.ckpt\), which can run any code") as refused:
        BaseModel.from_pretrained(str(tmp_path / "model.ckpt"))
    command = re.search(r'python -c ".*?"', str(refused.value))
    assert command is not None
    exec(shlex.split(command[0])[2], {})  # its own process would import torch once more
    same_tensors(BaseModel.from_pretrained(str(tmp_path / "model.safetensors")).unet, first.unet)


def rename_variant(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def name_absent_parts(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))


def forget_prompt_length(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("change", [rename_variant, name_absent_parts, forget_prompt_length])
def test_folders_as_people_have_them_load_as_the_plain_one(folder: Path, change: Damage) -> None:
    plain = BaseModel.from_pretrained(str(folder))
    change(folder)
    base = BaseModel.from_pretrained(str(folder))
    assert base.fingerprint == plain.fingerprint
    torch.testing.assert_close(base.encode_prompts(["a photo"]), plain.encode_prompts(["a photo"]))


def config_of(path: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        there = json.loads((folder / path).read_text()) if (folder / path).exists() else {}
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(there | values))

    return change


def spoil(part: str, value: float) -> Damage:
    def change(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        tensors = safetensors.torch.load_file(path)
        tensors[max(tensors, key=lambda name: tensors[name].numel())].view(-1)[-3] = value
        safetensors.torch.save_file(tensors, path, {"format": "pt"})

    return change


def lose_a_weight(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    del tensors["conv_in.bias"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def inpainting(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    config_of("model_index.json", _class_name="StableDiffusionInpaintPipeline")(folder)


def sdxl(folder: Path) -> None:
    two = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    config_of("model_index.json", _class_name="StableDiffusionXLPipeline", **two)(folder)


def flux(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    config_of("model_index.json", _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"])(
        folder
    )


def pickled(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
    path.unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only(part: str) -> Damage:
    def change(folder: Path) -> None:
        shutil.move(folder / part, folder.with_name("part"))
        shutil.rmtree(folder)
        shutil.move(folder.with_name("part"), folder)

    return change


def cut_off(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n")


def lora_folder(folder: Path) -> None:
    empty(folder)
    tensors = {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.zeros(1, 4)}
    safetensors.torch.save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def more_tokens(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["sks"])
    tokenizer.save_pretrained(folder / "tokenizer")


REFUSED: dict[str, tuple[Damage, str]] = {
    "sdxl": (sdxl, "text_encoder_2/config.json is missing"),
    "inpainting": (inpainting, r"an inpainting UNet \(9 input channels\)"),
    "flux": (flux, "it is a FLUX model, a transformer"),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"its tokenizer/ is missing"),
    "nan": (spoil("unet", float("nan")), r"its unet holds a weight that is NaN or infinite, in .*: get the file again"),
    "infinity": (spoil("vae", float("-inf")), "its vae holds a weight that is NaN or infinite"),
    "text-nan": (spoil("text_encoder", float("nan")), "its text_encoder holds a weight that is NaN"),
    "lost-weight": (lose_a_weight, r"its unet lacks 1 weights, such as conv_in.bias"),
    "cut-off": (cut_off, "its unet cannot be loaded"),
    "pickles": (pickled, r"its unet is a pickle \(.bin\).*save_pretrained"),
    "empty": (empty, "it is an empty folder"),
    "vae-folder": (only("vae"), r"it is a VAE alone \(AutoencoderKL\)"),
    "unet-folder": (only("unet"), r"it is a UNet alone \(UNet2DConditionModel\)"),
    "no-index": (lambda folder: (folder / "model_index.json").unlink(), "a folder without model_index.json"),
    "no-json": (lambda folder: (folder / "model_index.json").write_text("<html>"), "model_index.json cannot be read"),
    "flow": (config_of("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"), "scheduler"),
    "other-text": (config_of("text_encoder/config.json", architectures=["T5EncoderModel"]), "text_encoder is"),
    "other-unet": (config_of("unet/config.json", _class_name="UNet3DConditionModel"), "unet is"),
    "more-inputs": (config_of("unet/config.json", time_cond_proj_dim=8), "its unet"),
    "no-size": (config_of("unet/config.json", sample_size=None), "sample_size None: write the side of a latent"),
    "narrow-prompts": (config_of("unet/config.json", cross_attention_dim=48), "its unet cannot be loaded"),
    "many-tokens": (more_tokens, r"its tokenizer knows 55 tokens, its text encoder 54"),
    "pointer": (pointer, "is only a pointer to the weights: fetch them by git lfs pull"),
    "lora-folder": (lora_folder, "pytorch_lora_weights.safetensors in it is a LoRA"),
    "other-parts": (
        config_of("model_index.json", _class_name="KandinskyPipeline", transformer=[]),
        "it is a Kandinsky",
    ),
    "bad-tokenizer": (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"), "its tokenizer cannot be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_base_model_is_refused_in_one_sentence_that_says_what_it_is(name: str, folder: Path) -> None:
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        BaseModel.from_pretrained(str(folder))
    said = str(refused.value)
    assert said.startswith(f"cannot load a base model from '{folder}': ")
    assert "expected is Stable Diffusion 1.x, 2.x or XL: a diffusers folder" in said
    assert "\n" not in said


FILES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "kohya": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1, 4)}, "it is a LoRA"),
    "peft": ({"base_model.model.unet.down_blocks.0.to_q.lora_A.weight": (1, 4)}, "it is a LoRA"),
    "vae": ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "it is a VAE alone"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": (8, 4, 3, 3)}, "it is a UNet alone"),
    "no-vae": (
        {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
        "a Stable Diffusion checkpoint without VAE",
    ),
    "refiner": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "conditioner.embedders.0.model.ln_final.weight": (8,),
            "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
        },
        r"it is a Stable Diffusion XL model without text encoder \(no tensor conditioner.embedders.0.transformer",
    ),
    "playground": ({"edm_mean": (4,), "edm_std": (4,)}, "noise levels of EDM, such as Playground 2.5"),
    "unclip": (
        {
            "model.diffusion_model.label_emb.0.0.weight": (8, 8),
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        },
        r"it is a model that needs more than a prompt \(label_emb\)",
    ),
    "sd3": (
        {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (8, 8)},
        "it is a Stable Diffusion 3 model",
    ),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "it is a FLUX model"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "it is a ControlNet"),
    "embedding": ({"emb_params": (2, 768)}, "it is a textual inversion"),
    "other": ({"model.layers.0.mlp.weight": (8, 8)}, r"a file of another kind \(it holds model.layers.0.mlp.weight\)"),
    "none": ({}, r"another kind \(it holds no tensors\)"),
    "half": (
        {
            "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (8, 8, 3, 3),
            "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
        },
        "it lacks the tensor",
    ),
    "inpainting": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3),
            "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
        },
        r"an inpainting UNet \(9 input channels\)",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_told_by_its_tensors(name: str, tmp_path: Path) -> None:
    shapes, message = FILES[name]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=message) as refused:
        BaseModel.from_pretrained(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.safetensors", b"<html>404</html>", "is no whole .safetensors file"),
        ("model.safetensors", b"", "is no whole .safetensors file"),
        ("model.gguf", b"GGUF", "it is a file (.gguf) and no .safetensors checkpoint"),
        ("README", b"", "it is a file (without suffix)"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        BaseModel.from_pretrained(str(tmp_path / name))


def test_a_weight_too_large_for_float16_says_so() -> None:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, 1e5)
    check_finite("unet", layer)
    with pytest.raises(ValueError, match=r"too large for float16: load it as bfloat16"):
        check_finite("unet", layer.half())


@pytest.mark.parametrize("place", ["someone/model", "no/such.safetensors", "./no-such-folder", "~/no/such"])
def test_a_place_that_is_not_there_is_one_sentence(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no such (file or folder|folder here, and the hub)") as refused:
        BaseModel.from_pretrained(place)
    assert "\n" not in str(refused.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of someone/model in a cache of the hub, which is not to be asked."""
    cache = tmp_path / "hub" / "models--someone--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return cache / "snapshots" / "0123"


def test_a_hub_id_of_another_family_is_told_by_its_index_alone(hub: Path) -> None:
    """Before gigabytes are fetched."""
    hub.mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (hub / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="it is a FLUX model, a transformer"):
        BaseModel.from_pretrained("someone/model")


def test_a_hub_id_that_was_fetched_before_loads_without_network(folder: Path, hub: Path) -> None:
    shutil.copytree(folder, hub)
    same_tensors(load_parts("someone/model").unet, BaseModel.from_pretrained(str(folder)).unet)


def test_xl_of_the_hub_that_was_fetched_before_loads_without_network(hub: Path) -> None:
    tiny_xl().save_pretrained(hub)
    assert load_parts("someone/model").text_encoder_2 is not None
