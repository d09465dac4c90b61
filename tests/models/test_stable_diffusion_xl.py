"""Stable Diffusion XL is a base model like any other: conditions, pictures, fine-tuning and files equal diffusers' and peft's."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import peft
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from ldm_names import ldm_checkpoint
from safetensors.torch import load_file, save_file
from tiny_xl import tiny_xl
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.finetune import Finetuner, initial_vectors
from lora_diffusion.lora.formats import load, save
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.lora.rendering import initial_noise, render
from lora_diffusion.models.clip_tokenizer import clip_tokenizer
from lora_diffusion.models.known_unets import meta_unet
from lora_diffusion.models.parts import Parts, is_xl
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.serving.engine import Picture, RenderEngine

KOHYAS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
PROMPTS = ["a photo of sks person", "sks person in snow"]
RECIPE = FinetuneConfig(steps=3, batch_size=2, learning_rate=1e-2, instance_prompt=PROMPTS[0])
PEOPLE = [
    PersonPhotos(name, np.random.default_rng(i).integers(0, 256, (3, 32, 32, 3), np.uint8))
    for i, name in enumerate(("ada", "bob"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xl")
    tiny_xl().save_pretrained(path)
    return path


@pytest.fixture
def pipe() -> StableDiffusionXLPipeline:
    pipe = tiny_xl()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(tiny_xl())


@pytest.fixture(scope="module")
def layout(base: BaseModel) -> LoRALayout:
    return LoRALayout.from_unet(base.unet, rank=2, alpha=3.0, target_modules=("to_q", "to_v", "ff.net.2", "conv1"))


def random_vectors(layout: LoRALayout, K: int) -> Tensor:
    return 0.2 * torch.randn(K, layout.size, generator=torch.Generator().manual_seed(0))


def test_a_folder_loads_as_xl_and_keeps_its_fingerprint_in_every_dtype(folder: Path, base: BaseModel) -> None:
    loaded = BaseModel.from_pretrained(str(folder))
    assert is_xl(loaded)
    assert (loaded.image_size, loaded.latent_shape, loaded.fingerprint) == (32, (4, 8, 8), base.fingerprint)
    other = BaseModel.from_pipeline(tiny_xl(seed=1))
    other.unet, other.vae, other.text_encoder = base.unet, base.vae, base.text_encoder
    assert other.fingerprint != base.fingerprint, "the second text encoder counts"
    for dtype in (torch.float16, torch.bfloat16):
        half = BaseModel.from_pretrained(str(folder), dtype=dtype)
        assert (half.fingerprint, half.dtype) == (base.fingerprint, dtype)
        assert half.vae.dtype == torch.float32, "the VAE of XL overflows in float16"


def test_the_mended_vae_runs_in_the_dtype_of_the_unet(tmp_path: Path) -> None:
    pipe = tiny_xl()
    pipe.vae.register_to_config(force_upcast=False)
    pipe.save_pretrained(tmp_path)
    assert BaseModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_another_size_is_a_line_of_the_unets_configuration(folder: Path, base: BaseModel, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "wide")
    config = tmp_path / "wide" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 12}))
    wide = BaseModel.from_pretrained(str(tmp_path / "wide"))
    assert (wide.image_size, wide.fingerprint) == (48, base.fingerprint)
    assert render(wide, None, PROMPTS[:1], [0], num_inference_steps=1).shape == (1, 48, 48, 3)
    added = wide.conditioning(wide.encode_prompts(PROMPTS[:1]), torch.zeros(1, *wide.latent_shape))["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[48, 48, 0, 0, 48, 48]]


def test_prompts_are_encoded_as_diffusers_does(base: BaseModel, pipe: StableDiffusionXLPipeline) -> None:
    text, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS)
    latents = torch.zeros(2, *base.latent_shape)
    for prompts, tokens, summary in ((PROMPTS, text, pooled), (["", ""], negative, negative_pooled)):
        given = base.conditioning(base.encode_prompts(prompts), latents)
        torch.testing.assert_close(given["encoder_hidden_states"], tokens)
        torch.testing.assert_close(given["added_cond_kwargs"]["text_embeds"], summary)
        assert given["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("zeros", [True, False])
def test_pictures_are_those_of_diffusers_pipeline(pipe: StableDiffusionXLPipeline, zeros: bool) -> None:
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    base = BaseModel.from_pipeline(tiny_xl())
    base.force_zeros_for_empty_prompt = zeros
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    ours = render(base, None, PROMPTS, [0, 1], **options)
    theirs = pipe(PROMPTS, latents=initial_noise(base, [0, 1]), output_type="np", height=32, width=32, **options).images
    assert np.abs(ours.astype(int) - np.rint(theirs * 255).astype(int)).max() <= 1
    assert ours.std() > 1


@pytest.mark.parametrize("marks", [(), ("v_pred", "ztsnr")], ids=["plain", "v-prediction"])
def test_a_single_file_gives_every_tensor_of_the_pipeline_that_it_was_made_of(
    tmp_path: Path, marks: tuple[str, ...]
) -> None:
    pipe = tiny_xl(words=True)
    tensors = ldm_checkpoint(pipe) | {mark: torch.zeros(0) for mark in marks}
    save_file(tensors, tmp_path / "model.safetensors", {"modelspec.resolution": "64x64"})
    base = BaseModel.from_pretrained(str(tmp_path / "model.safetensors"))
    expected = BaseModel.from_pipeline(pipe)
    config = {"clip_sample": False, "set_alpha_to_one": False}
    if marks:
        config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    expected.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    assert is_xl(base)
    assert base.fingerprint == expected.fingerprint
    words = ["a photo of sks person", "Zoë's 2nd photo, smiling!"]
    torch.testing.assert_close(base.encode_prompts(words), expected.encode_prompts(words))
    pictures = [render(model, None, words, [0, 1], num_inference_steps=2) for model in (base, expected)]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_draws_in_diffusers_what_the_bank_draws(
    base: BaseModel, layout: LoRALayout, pipe: StableDiffusionXLPipeline, tmp_path: Path, format: str
) -> None:
    vectors = random_vectors(layout, 2)
    file = save(vectors[0], layout, tmp_path / "lora.safetensors", format)  # type: ignore[arg-type]
    if format == "kohya":
        assert all(key.startswith(KOHYAS) for key in load_file(file)), "as kohya's trainer for SDXL names them"
    assert torch.equal(load(file, layout), vectors[0])
    ours = render(base, vectors, PROMPTS, [0, 1], bank=LoRABank(base.unet, layout), num_inference_steps=2)[0]
    plain = render(base, None, PROMPTS[:1], [0], num_inference_steps=2)[0]
    pipe.load_lora_weights(str(file))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32}
    theirs = pipe(PROMPTS[0], latents=initial_noise(base, [0]), **options).images[0]
    assert np.abs(ours.astype(int) - np.rint(theirs * 255).astype(int)).max() <= 1
    assert np.abs(ours.astype(int) - plain).max() > 10


def peft_loop(base: BaseModel, layout: LoRALayout, person: PersonPhotos) -> np.ndarray:
    """The recipe for one person as diffusers' script for SDXL writes it: peft, AdamW, a loop."""
    names = [entry.name for entry in layout.entries]
    config = peft.LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=names)
    unet = peft.inject_adapter_in_model(config, copy.deepcopy(base.unet))
    start = layout.split(initial_vectors(layout, RECIPE.seed))
    sides = ("lora_A", "lora_B")
    weights = [[getattr(unet.get_submodule(name), side)["default"].weight for side in sides] for name in names]
    with torch.no_grad():
        for name, pair in zip(names, weights, strict=True):
            for weight, begin in zip(pair, start[name], strict=True):
                weight.copy_(begin[0].view(weight.shape))
    learned = [weight for pair in weights for weight in pair]
    optimizer = torch.optim.AdamW(learned, lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    pipe, generator = tiny_xl(), torch.Generator().manual_seed(RECIPE.seed)
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder_2.requires_grad_(False)
    text, _, pooled, _ = pipe.encode_prompt([RECIPE.instance_prompt] * 2, do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    pixels = torch.from_numpy(person.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean.detach() * 0.13025
    for step in range(RECIPE.steps):
        x0 = latents[[(step * 2 + i) % 3 for i in range(2)]]
        timesteps = (torch.rand(2, generator=generator, dtype=torch.float64) * 1000).long()
        noise = torch.randn(x0.shape, generator=generator)
        noisy = DDIMScheduler.from_config(pipe.scheduler.config).add_noise(x0, noise, timesteps)
        prediction = unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        loss = (prediction - noise).square().mean()
        optimizer.param_groups[0]["lr"] = RECIPE.rate(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, RECIPE.max_grad_norm)
        optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in learned]).numpy()


def test_people_fine_tuned_together_equal_a_plain_peft_loop_for_each(base: BaseModel, layout: LoRALayout) -> None:
    together = Finetuner(base, layout, RECIPE)(PEOPLE).vectors_KN
    start = initial_vectors(layout, RECIPE.seed)[0].numpy()
    for vector, person in zip(together, PEOPLE, strict=True):
        expected = peft_loop(base, layout, person)
        assert np.linalg.norm(vector - expected) < 1e-3 * np.linalg.norm(expected - start)
    assert np.linalg.norm(together[0] - together[1]) > 0.1 * np.linalg.norm(together[0] - start), "people differ"


def test_the_endpoints_batch_draws_what_render_draws(base: BaseModel, layout: LoRALayout) -> None:
    vectors = random_vectors(layout, 2)
    engine = RenderEngine(base, layout)
    pictures = [Picture(vectors[k].numpy(), PROMPTS[k], ("", "snow")[k], k, 3.0, 2 + k) for k in range(2)]
    rows = engine.admit(pictures)
    while engine.rows:
        engine.advance()
    for row, vector, picture in zip(rows, vectors, pictures, strict=True):
        expected = render(
            base,
            vector[None],
            [picture.prompt],
            [picture.seed],
            bank=LoRABank(base.unet, layout),
            num_inference_steps=picture.num_inference_steps,
            negative_prompt=picture.negative_prompt,
        )
        assert row.pixels_HWC is not None
        assert np.abs(row.pixels_HWC.astype(int) - expected[0]).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_corpus_job_tries_a_step_of_its_work_on_it(
    folder: Path, base: BaseModel, dtype: Literal["float32"]
) -> None:
    config = CorpusConfig("people", "corpus", base=str(folder), dtype=dtype, finetune=RECIPE, class_images=1)
    maker = LoRAMaker(config)
    maker.try_out()
    assert maker.manifest().base["fingerprint"] == base.fingerprint


def test_at_full_size_prompts_layers_and_gradients_fit() -> None:
    """Without weights: what each part gives has the shape that the next one takes."""
    sizes = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
    second = {"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 5120}
    with torch.device("meta"):
        encoders = [
            CLIPTextModel(CLIPTextConfig(**sizes)),
            CLIPTextModelWithProjection(CLIPTextConfig(**second, projection_dim=1280)),
        ]
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    parts = meta_unet("sdxl"), vae, encoders[0], clip_tokenizer(), DDIMScheduler()
    check = replace(Parts(*parts), text_encoder_2=encoders[1], tokenizer_2=clip_tokenizer(pad_token="!"))
    base = BaseModel.from_pipeline(check, "meta")
    layout = LoRALayout.from_unet(base.unet, rank=1, target_modules=("to_q", "to_v"))
    assert layout.size == 725_760
    vectors_KN = torch.zeros(2, layout.size, device="meta", requires_grad=True)
    latents = torch.zeros(2, 4, 128, 128, device="meta")
    text = base.encode_prompts(PROMPTS)
    with LoRABank(base.unet, layout).active(vectors_KN, 1):
        answer = base.unet(latents, torch.zeros(2, device="meta"), **base.conditioning(text, latents)).sample
        answer.sum().backward()
    assert answer.shape == latents.shape
    assert vectors_KN.grad is not None
    assert base.pictures(answer).shape == (2, 3, 1024, 1024)
