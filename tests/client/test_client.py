"""Laws of the Python client and of the command `lora-diffusion`, against the endpoint behind real HTTP."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from http_endpoint import in_process
from PIL import Image
from serve_world import base_model, save_synthesizer

from lora_diffusion.cli import main
from lora_diffusion.client import ApiError, AsyncClient, Client, LoRA, Pictures, Progress
from lora_diffusion.client import Image as Picture
from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.local import local_studio
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.serving.config import LimitsConfig, SamplingConfig, ServeConfig

PEOPLE = sorted((Path(__file__).parents[2] / "lora_diffusion/endpoint/static/people").glob("*.jpg"))
ADA, BOB = PEOPLE[:2]
PROMPT = "a photo of sks person, smiling"


@pytest.fixture(scope="module")
def synthesizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("synthesizer"))


@pytest.fixture(scope="module")
def address(synthesizer: Path) -> Iterator[str]:
    sampling = SamplingConfig(num_inference_steps=4)
    config = ServeConfig(synthesizer=str(synthesizer), sampling=sampling, limits=LimitsConfig(max_images=4))
    with in_process(build_api(local_studio(config))) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout=100) as client:
        yield client


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(picture.data)))


def test_a_photo_becomes_pictures_and_a_file_that_the_library_loads(client: Client, tmp_path: Path) -> None:
    made = client.personalize(ADA, PROMPT, format="kohya", num_images=2, image_seed=5, seed=1)
    assert [image.seed for image in made.images] == [5, 6]
    assert all(pixels(image).shape == (64, 64, 3) for image in made.images)
    assert made.lora.similarity is not None
    assert made.lora.seed == 1
    assert made.file is not None
    path = made.file.save(tmp_path)
    vector_N = formats.load(path, LoRALayout.from_unet(base_model().unet))
    again = formats.load(client.download(made.lora, "vector").save(tmp_path / "v.safetensors"))
    assert np.array_equal(vector_N, again)


def test_events_come_in_order_and_carry_the_same_pictures(client: Client) -> None:
    options: dict[str, Any] = {"num_images": 2, "image_seed": 5, "seed": 1}
    events = list(client.personalize_events(ADA, PROMPT, **options))
    kinds = [type(event) for event in events]
    assert kinds[0] is LoRA
    assert kinds[-1] is Pictures
    assert Progress in kinds
    streamed = sorted((event for event in events if isinstance(event, Picture)), key=lambda image: image.index)
    whole = client.personalize(ADA, PROMPT, **options)
    for a, b in zip(streamed, whole.images, strict=True):
        assert a.seed == b.seed
        assert np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def test_edits_interpolations_latents_and_uploads(client: Client) -> None:
    (ada,) = client.loras(ADA.read_bytes(), seed=0)
    (bob,) = client.loras([BOB], seed=0)
    older = client.edit(ada, {"age": 2.0})
    assert older.id not in (ada.id, bob.id)
    way = client.interpolate(ada, bob.id, [0.25, 0.75])
    assert [lora.position for lora in way] == [0.25, 0.75]
    (latent,) = client.latents(ADA, seed=0)
    assert client.loras(latent)[0].id == ada.id
    uploaded = client.upload(client.download(older, "kohya").data)
    assert (
        client.download(uploaded, "kohya").data[-1000:] == client.download(older, "kohya").data[-1000:]
    )  # the last numbers
    pictures = client.images(older, PROMPT, num_images=1, image_seed=3)
    assert pictures.lora.id == older.id
    assert client.model()["synthesizer"]["attributes"] == ["smile", "age"]
    ((face,),) = client.embeddings([ADA])
    assert len(face.embedding) == 512
    like = client.likeness([ADA, BOB], PROMPT, num_images=1, seed=0)
    assert like.photos is not None
    assert like.photos < 0.9
    assert max(like.lora, like.base) <= 1


def test_what_was_deleted_is_gone_and_deleting_it_again_is_no_error(client: Client) -> None:
    (lora,) = client.loras(ADA, seed=77)
    client.delete(lora)
    client.delete(lora)
    with pytest.raises(ApiError, match="was deleted") as error:
        client.download(lora)
    assert (error.value.status, error.value.reason) == (404, "unknown_lora")


def test_refusals_say_why_and_are_not_repeated(client: Client) -> None:
    blank = BytesIO()
    Image.new("RGB", (64, 64)).save(blank, "PNG")
    with pytest.raises(ApiError, match="face") as error:
        client.loras(blank.getvalue())
    assert error.value.reason == "no_face"
    assert error.value.request_id
    with pytest.raises(ValueError, match="no photos"):
        client.loras([])


def test_async_client_says_the_same_as_the_sync_one(client: Client, address: str) -> None:
    async def both() -> tuple[list[LoRA], list[LoRA], list[type]]:
        async with AsyncClient(address, timeout=100) as other:
            ada, bob = await other.loras(ADA, seed=0), await other.loras(BOB, seed=0)
            kinds = [type(event) async for event in other.personalize_events(ADA, PROMPT, num_images=1)]
            await other.delete("0" * 32)
            return ada, bob, kinds

    ada, bob, kinds = asyncio.run(both())
    assert [ada[0].id, bob[0].id] == [client.loras(photo, seed=0)[0].id for photo in (ADA, BOB)]
    assert kinds[0] is LoRA
    assert kinds[-1] is Pictures


def test_help_shows_what_a_call_takes_and_gives() -> None:
    shown = str(inspect.signature(Client.download))
    assert shown == "(self, lora: 'answers.LoRA | str', format: 'Format' = 'kohya') -> 'answers.File'"
    assert "score: draw each once" in (inspect.getdoc(AsyncClient.loras) or "")
    assert inspect.iscoroutinefunction(AsyncClient.loras)


# -- the command -----------------------------------------------------------------------------------------------------------

FIXED = ["--prompt", PROMPT, "--seed", "1", "--image-seed", "5", "--num-images", "2", "--steps", "4"]


def test_the_command_makes_the_same_here_and_on_a_server(
    address: str, synthesizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["personalize", str(ADA), *FIXED, "--out", str(tmp_path / "there"), "--server", address])
    told = capsys.readouterr().out
    main(["personalize", str(ADA), *FIXED, "--out", str(tmp_path / "here"), "--synthesizer", str(synthesizer)])
    here = capsys.readouterr()
    assert told.count("similarity") == here.out.count("similarity") == 2
    said = here.err.splitlines()
    assert said[0] == f"loading the synthesiser {synthesizer} and its models"
    assert f"1 photo -> a LoRA and 2 pictures of: {PROMPT}" in said
    layout = LoRALayout.from_unet(base_model().unet)
    there, made = (formats.load(tmp_path / name / "lora.safetensors", layout) for name in ("there", "here"))
    assert torch.allclose(there, made, atol=1e-5)
    for name in ("5.png", "6.png"):
        a, b = (np.asarray(Image.open(tmp_path / where / name)).astype(int) for where in ("there", "here"))
        assert np.abs(a - b).max() <= 1


def test_the_command_makes_a_lora_without_pictures(address: str, tmp_path: Path) -> None:
    words = ["--num-images", "0", "--format", "kohya", "--server", address]
    main(["personalize", str(ADA), str(ADA), "--out", str(tmp_path), *words])
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such.jpg"], "there is no file .*/no-such.jpg"),
        (["{tmp}/empty.jpg"], r"empty\.jpg: The file has 0 bytes"),
        (["{tmp}/notes.jpg"], r"notes\.jpg: The file is no image that we read"),
        (["{tmp}"], r"is a folder: give the photos in it, as in .*/\*\.jpg"),
        (
            [str(ADA), "--out", "{tmp}/empty.jpg"],
            r"cannot use .*/empty\.jpg: a part of this path is a file, not a folder",
        ),
        ([str(ADA), "--synthesizer", "tinny"], "no synthesiser at .*/tinny .*or the name of a shipped one: tiny$"),
        (
            ["{tmp}/two.png"],
            r"two\.png shows 2 faces\. Crop it to one person, or ask for the largest: --largest-face\.$",
        ),
        (["no-such.jpg", "--server", "http://127.0.0.1:9"], "no-such.jpg"),
        ([str(ADA), "--server", "http://127.0.0.1:9", "--timeout", "0.5"], "cannot be reached.*lora-diffusion serve"),
    ],
)
def test_the_commands_errors_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.jpg").write_text("hello")
    two = [np.asarray(Image.open(photo).convert("RGB")) for photo in (ADA, BOB)]
    Image.fromarray(np.concatenate(two, 1)).save(tmp_path / "two.png")
    with pytest.raises(SystemExit) as exit:
        main(["personalize", "--out", str(tmp_path / "out"), *(word.format(tmp=tmp_path) for word in words)])
    assert re.search(message, str(exit.value))
    assert "\n" not in str(exit.value)
    assert not (tmp_path / "out").exists()


def test_the_server_says_why_it_refuses(address: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(SystemExit, match=r"black\.png shows no face that can be used.*no_face"):
        main(["personalize", str(tmp_path / "black.png"), "--out", str(tmp_path / "out"), "--server", address])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [[], ["--num-images", "-1"], ["--steps", "0"], ["--format", "pickle"], ["--prompt", " "]]
)
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["personalize", str(ADA), *(["--out", "x"] if words else []), *words])
    assert exit.value.code == 2


def test_the_end_of_a_prompt_that_is_not_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = f"{PROMPT} {'forest ' * 120}at night"
    main(["personalize", str(ADA), "--out", str(tmp_path), "--steps", "1", "--negative-prompt", prompt])
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "too long" in line]
    assert re.fullmatch("the negative prompt is too long, and its end is not read: (forest )+at night", told)


def test_ctrl_c_is_one_line_and_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_diffusion.personalize.Personalizer.__call__", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(["personalize", str(ADA), "--out", str(tmp_path / "out")])
    assert exit.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lora-diffusion: Stopped. The same command goes on."
    assert not (tmp_path / "out").exists()
