"""Laws of the HTTP API, with all stages in this process: what goes in, and what comes out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from serve_client import ADA, ADA_AGAIN, BOB, FAST, LOOP, PROMPT, Client, latent_of, pixels, problem
from serve_world import base_model, recogniser_id

from lora_diffusion.endpoint.announce import announced
from lora_diffusion.endpoint.api import build_api
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import LoRARecord


def test_photo_gives_lora_and_pictures_in_one_go(api: Client) -> None:
    response = api.form("/v1/personalize", prompt=PROMPT, num_images=2, seed=1, image_seed=5, format="kohya", **FAST)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [image["seed"] for image in answer["images"]] == [5, 6]
    assert pixels(answer["images"][0]["data"]).shape == (64, 64, 3)
    assert -1 <= answer["lora"]["similarity"] <= 1
    assert -1 <= answer["lora"]["nearest"]["similarity"] <= 1
    assert base64.b64decode(answer["file"]["data"]) == api("GET", answer["lora"]["files"]["kohya"]).content


def test_an_embedding_that_says_it_is_of_another_recogniser_is_refused(api: Client) -> None:
    ours = api("GET", "/v1/model").json()["identity"]["recogniser"]
    asked = {"embedding": [1.0] * 512, "seed": 3, "latent_inference_steps": 3}
    believed = api.json("/v1/latents", **asked)
    assert api.json("/v1/latents", recogniser=ours["fingerprint"], **asked).json() == believed.json()
    stranger = recogniser_id("tiny-b")["fingerprint"]
    detail = problem(api.json("/v1/latents", recogniser=stranger, **asked), 422, "invalid_request")["detail"]
    assert detail.startswith(
        f"The embedding is of the recogniser {stranger}; this server's is tiny ({ours['fingerprint']})"
    )


def test_stages_one_by_one_lead_to_the_same_picture_as_in_one_go(api: Client) -> None:
    whole = api.form("/v1/personalize", prompt=PROMPT, seed=3, image_seed=4, **FAST).json()
    found = api.form("/v1/embeddings").json()["photos"][0]
    assert len(found["faces"]) == 1
    sampled = api.json(
        "/v1/latents", embedding=found["faces"][0]["embedding"], seed=3, latent_inference_steps=3
    ).json()["latents"][0]
    made = api.json("/v1/loras", latent=sampled["latent"])
    assert made.status_code == 201
    lora = made.json()["loras"][0]
    assert lora["id"] == whole["lora"]["id"]
    image = api.json("/v1/images", lora=lora["id"], prompt=PROMPT, image_seed=4, num_inference_steps=3).json()[
        "images"
    ][0]
    assert np.abs(pixels(image["data"]).astype(int) - pixels(whole["images"][0]["data"]).astype(int)).max() <= 1


def test_same_request_same_answer_and_random_seeds_are_told(api: Client) -> None:
    first, second = (api.form("/v1/loras", latent_inference_steps=3).json()["loras"][0] for _ in range(2))
    assert first["id"] != second["id"]
    again = api.form("/v1/loras", seed=first["seed"], latent_inference_steps=3).json()["loras"][0]
    assert again["id"] == first["id"]


def test_samples_of_a_person_differ_and_sample_i_has_seed_plus_i(api: Client) -> None:
    loras = api.form("/v1/loras", num_samples=3, seed=10, latent_inference_steps=3).json()["loras"]
    assert [lora["seed"] for lora in loras] == [10, 11, 12]
    vectors = [vector_of(api("GET", lora["files"]["vector"])) for lora in loras]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    cold = [vector_of(api.form("/v1/loras", seed=i, format="vector", temperature=0)) for i in (1, 2)]
    assert np.array_equal(*cold)
    # to float error, so its id, a hash of the bits, may be another: what ran in its batch is not the same
    alone = vector_of(api.form("/v1/loras", seed=11, format="vector", latent_inference_steps=3))
    np.testing.assert_allclose(alone, vectors[1], atol=1e-5)


def vector_of(file: httpx.Response) -> np.ndarray:
    return safetensors.numpy.load(file.content)["vector"]


def test_several_photos_are_one_person_between_them(api: Client) -> None:
    photos = [("photo", path.read_bytes()) for path in (ADA, ADA_AGAIN)]
    data = {"seed": "1", "latent_inference_steps": "3"}
    both = api("POST", "/v1/loras", files=photos, data=data).json()["loras"][0]["id"]
    each = {api("POST", "/v1/loras", files=[photo], data=data).json()["loras"][0]["id"] for photo in photos}
    assert both not in each
    in_json = api.json(
        "/v1/loras", photos=[base64.b64encode(data).decode() for _, data in photos], seed=1, latent_inference_steps=3
    )
    assert in_json.json()["loras"][0]["id"] == both


def test_a_photo_of_another_person_is_left_out_and_named(api: Client) -> None:
    """By every route that takes photos of one person; the LoRA is that of the others."""
    own = [("photo", (path.name, path.read_bytes())) for path in (ADA, ADA_AGAIN)]
    mixed = [own[0], ("photo", ("böb.png", BOB.read_bytes())), own[1]]
    data = {"seed": "1", "latent_inference_steps": "3"}
    (lora,) = api("POST", "/v1/loras", files=mixed, data=data).json()["loras"]
    assert lora["id"] == api("POST", "/v1/loras", files=own, data=data).json()["loras"][0]["id"]
    (left_out,) = lora["left_out"]
    assert left_out["photo"] == "böb.png"
    assert -1 <= left_out["cosine"] < 0.2
    drawn = data | {"prompt": PROMPT, "num_inference_steps": "3"}
    assert api("POST", "/v1/personalize", files=mixed, data=drawn).json()["lora"]["left_out"] == [left_out]
    assert api("POST", "/v1/images", files=mixed, data=drawn).json()["lora"]["left_out"] == [left_out]
    assert api("POST", "/v1/latents", files=mixed, data=data).json()["left_out"] == [left_out]
    own_marks, marks = (api("POST", "/v1/likeness", files=of, data=drawn).json() for of in (own, mixed))
    assert (marks["photos"], marks["left_out"]) == (own_marks["photos"], [left_out])
    file = api("POST", "/v1/loras", files=mixed, data=data | {"format": "kohya"})
    assert file.headers["x-lora-left-out"] == "b%C3%B6b.png"
    assert "x-lora-left-out" not in api("POST", "/v1/loras", files=own, data=data | {"format": "kohya"}).headers


def test_photos_in_which_nobody_is_the_most_are_refused(api: Client) -> None:
    mixed = [("photo", (path.name, path.read_bytes())) for path in (ADA, BOB)]
    told = problem(api("POST", "/v1/loras", files=mixed), 422, "different_people")
    assert re.fullmatch(
        r"The photos show different people \(cosine of each with the others: 80000-0.png -?0.\d\d, 80001-1.png -?0.\d\d\). "
        r"Send photos of one person.",
        told["detail"],
    )


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "vector", "latent"])
def test_file_of_every_format_comes_back_as_the_same_lora(api: Client, tmp_path: Path, format: str) -> None:
    file = api.form("/v1/loras", seed=1, format=format, latent_inference_steps=3)
    assert file.status_code == 200
    assert "attachment" in file.headers["content-disposition"]
    lora_id = file.headers["x-lora-id"]
    assert api("GET", f"/v1/loras/{lora_id}?format={format}").content == file.content
    if format == "latent":
        (tmp_path / "x.safetensors").write_bytes(file.content)
        with safetensors.safe_open(tmp_path / "x.safetensors", "np") as opened:
            latent = {"values": opened.get_tensor("latent").tolist(), "model": opened.metadata()["model"]}
        assert api.json("/v1/loras", latent=latent).json()["loras"][0]["id"] == lora_id
    else:
        uploaded = api("POST", "/v1/loras", files={"lora_file": ("../../etc/x", file.content)})
        assert uploaded.status_code == 201, uploaded.text
        ours, theirs = (lora_arrays(api, one) for one in (lora_id, uploaded.json()["loras"][0]["id"]))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def lora_arrays(api: Client, lora_id: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(api("GET", f"/v1/loras/{lora_id}?format=vector").content)


def test_diffusers_file_loads_as_the_vector_that_was_served(api: Client, tmp_path: Path) -> None:
    layout = LoRALayout.from_unet(base_model().unet)
    files = {name: api.form("/v1/loras", seed=1, format=name).content for name in ("diffusers", "vector")}
    vectors = []
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        vectors.append(formats.load(tmp_path / f"{name}.safetensors", layout))
    assert bool((vectors[0] == vectors[1]).all())


def test_score_compares_drawn_faces_with_the_photo(api: Client) -> None:
    lora = api.form("/v1/loras", seed=1, score="true", latent_inference_steps=3).json()["loras"][0]
    assert -1 <= lora["similarity"] <= 1
    problem(api.json("/v1/loras", latent=latent_of(api), score=True), 422, "invalid_request")


@pytest.mark.parametrize(("accept", "kind"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/jpeg", "JPEG")])
def test_picture_itself_is_answered_to_who_accepts_images(api: Client, accept: str, kind: str) -> None:
    response = api.form("/v1/images", prompt=PROMPT, headers={"Accept": accept}, **FAST)
    assert response.headers["content-type"] == accept
    assert Image.open(io.BytesIO(response.content)).format == kind
    problem(api.form("/v1/images", prompt=PROMPT, num_images=2, headers={"Accept": accept}), 406, "not_acceptable")
    problem(api.form("/v1/images", prompt=PROMPT, headers={"Accept": "video/mp4"}), 406, "not_acceptable")


def test_events_tell_lora_progress_pictures_and_the_end(api: Client) -> None:
    response = api.form(
        "/v1/personalize", prompt=PROMPT, num_images=2, image_seed=4, headers={"Accept": "text/event-stream"}, **FAST
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    names = [name for name, _ in events]
    assert names[0] == "lora"
    assert names[-1] == "done"
    assert names.count("image") == 2
    assert "progress" in names
    assert [image["seed"] for image in events[-1][1]["images"]] == [4, 5]
    assert pixels(next(data for name, data in events if name == "image")["data"]).shape == (64, 64, 3)
    # what is refused is refused with its status, not with an event
    refused = api.json("/v1/images", lora="0" * 32, prompt=PROMPT, headers={"Accept": "text/event-stream"})
    problem(refused, 404, "unknown_lora")


def test_edit_changes_the_person_and_strength_zero_does_not(api: Client) -> None:
    latent = latent_of(api)
    same = api.json("/v1/loras", latent=latent).json()["loras"][0]["id"]
    assert api.json("/v1/edits", latent=latent, edits={"smile": 0}).json()["loras"][0]["id"] == same
    edited = api.json("/v1/edits", lora=same, edits={"smile": 1.5, "age": -1})
    assert edited.status_code == 201
    assert edited.json()["loras"][0]["id"] != same
    told = problem(api.json("/v1/edits", latent=latent, edits={"wings": 1}), 422, "unknown_attribute")
    assert "smile" in told["detail"]


def test_interpolation_begins_and_ends_with_the_two_people(api: Client) -> None:
    a, b = latent_of(api, ADA), latent_of(api, BOB)
    ends = [api.json("/v1/loras", latent=latent).json()["loras"][0]["id"] for latent in (a, b)]
    path = api.json("/v1/interpolations", a={"latent": a}, b={"lora": ends[1]}, num=3).json()["loras"]
    assert [lora["position"] for lora in path] == [0, 0.5, 1]
    vectors = [api("GET", lora["files"]["latent"]).content for lora in path]
    assert len(set(vectors)) == 3
    assert api("GET", f"/v1/loras/{ends[0]}").json()["id"] == ends[0]


def test_deleted_lora_is_gone_at_once(api: Client) -> None:
    lora = api.form("/v1/loras", seed=99, latent_inference_steps=3).json()["loras"][0]
    lora_id, token = lora["id"], {"X-Deletion-Token": lora["deletion_token"]}
    problem(api("DELETE", f"/v1/loras/{lora_id}"), 403, "not_yours")
    problem(api("DELETE", f"/v1/loras/{lora_id}", headers={"X-Deletion-Token": "0" * 32}), 403, "not_yours")
    assert api("DELETE", f"/v1/loras/{lora_id}", headers=token).status_code == 204
    problem(api("GET", f"/v1/loras/{lora_id}"), 404, "unknown_lora")
    problem(api("GET", f"/v1/loras/{lora_id}?format=kohya"), 404, "unknown_lora")
    problem(api.json("/v1/images", lora=lora_id, prompt=PROMPT), 404, "unknown_lora")
    problem(api("DELETE", f"/v1/loras/{lora_id}"), 404, "unknown_lora")


def test_lora_that_was_just_made_is_drawn_although_the_library_lost_it(
    api: Client, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(lora_id: str, record: LoRARecord, token: str) -> None:
        pass

    monkeypatch.setattr(studio.library, "put", lose)
    answer = api.form("/v1/personalize", prompt=PROMPT, **FAST)
    assert answer.status_code == 200, answer.text
    # but one that a client names, and that is gone, is gone
    problem(api.json("/v1/images", lora=answer.json()["lora"]["id"], prompt=PROMPT), 404, "unknown_lora")


def test_model_tells_what_a_client_needs_to_know(api: Client) -> None:
    model = api("GET", "/v1/model").json()
    base = base_model()
    shipped = {"name": "tiny-sd", "fingerprint": base.fingerprint, "image_size": 64, "words": base.words}
    assert (model["base"], model["people"]) == (shipped, "rendered")
    assert model["layout"]["layout_id"] == LoRALayout.from_unet(base.unet).layout_id
    assert model["synthesizer"]["attributes"] == ["smile", "age"]
    assert model["limits"]["max_images"] == 4
    recommended = {
        "latent_guidance_scale": 1.0,
        "latent_inference_steps": 25,
        "temperature": 1.0,
        "deviation_scale": 1.0,
    }
    assert recommended.items() <= model["defaults"].items()
    assert latent_of(api)["model"] == model["synthesizer"]["id"]


def test_operations_answer(api: Client) -> None:
    assert api("GET", "/healthz").json() == {"status": "ok"}
    assert api("GET", "/readyz").json() == {"status": "ready"}
    api.form("/v1/personalize", prompt=PROMPT, **FAST)
    text = api("GET", "/metrics").text
    for stage in ("embedder", "denoiser", "decoder", "renderer"):
        assert f'lora_diffusion_stage_work_seconds_count{{stage="{stage}"}}' in text
        assert f'lora_diffusion_stage_batch_size_count{{stage="{stage}"}}' in text
    assert 'lora_diffusion_requests_total{route="/v1/personalize",status="200"}' in text
    assert "lora_diffusion_library_loras " in text


def test_docs_load_nothing_from_elsewhere(api: Client) -> None:
    page = api("GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 3
    for source in sources:
        assert source.startswith("data:") or api("GET", f"/{source}").status_code == 200


def test_it_says_once_that_all_stages_answer(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    class Late:
        """A stage that is still loading when it is first asked."""

        asked = 0

        async def ready(self) -> bool:
            self.asked += 1
            if self.asked == 1:
                raise ServingError("overloaded", "not yet")
            return True

    late: Any = Late()
    names = ("embedder", "denoiser", "decoder", "library")
    waiting = Studio(studio.config, studio.metrics, renderer=late, **{name: getattr(studio, name) for name in names})
    app = announced(build_api(waiting), waiting)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            while "is ready" not in (said := capsys.readouterr().out):
                await asyncio.sleep(0.1)
            assert said == "LoRA Diffusion is ready. Ctrl-C ends it.\n"

    LOOP.run_until_complete(start())
    assert late.asked == 2
