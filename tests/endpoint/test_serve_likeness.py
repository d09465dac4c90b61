"""How strong a LoRA works, and how like the person it is: on one scale, with landmarks."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serve_client import ADA, ADA_AGAIN, FAST, PROMPT, Client, pixels, problem

DRAWN: dict[str, Any] = {"prompt": PROMPT, "image_seed": 3, **FAST}
STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def lora(api: Client) -> str:
    id: str = api.form("/v1/loras", ADA, seed=1, latent_inference_steps=3).json()["loras"][0]["id"]
    return id


@pytest.fixture(scope="module")
def embedding(api: Client) -> list[float]:
    values: list[float] = api.form("/v1/embeddings", ADA).json()["photos"][0]["faces"][0]["embedding"]
    return values


def drawn(api: Client, lora: str, scale: float) -> np.ndarray:
    answer = api.json("/v1/images", lora=lora, prompt=PROMPT, image_seed=3, lora_scale=scale, **STEPS)
    return pixels(answer.json()["images"][0]["data"]).astype(float)


def test_a_scale_of_0_draws_with_the_base_model_and_1_with_the_lora(api: Client, lora: str) -> None:
    other = api.form("/v1/loras", ADA_AGAIN, seed=5, latent_inference_steps=3).json()["loras"][0]["id"]
    assert (drawn(api, lora, 0) == drawn(api, other, 0)).all()  # nothing of either
    whole = api.json("/v1/images", lora=lora, prompt=PROMPT, image_seed=3, **STEPS).json()["images"][0]
    assert (drawn(api, lora, 1) == pixels(whole["data"])).all()
    near, far = (np.abs(drawn(api, lora, scale) - drawn(api, lora, 0)).mean() for scale in (0.5, 1.5))
    assert 0 < near < far


def test_pictures_of_a_lora_are_scored_against_any_reference(api: Client, lora: str, embedding: list[float]) -> None:
    settings = {"lora": lora, **{key: DRAWN[key] for key in ("prompt", "image_seed", "num_inference_steps")}}
    scored = api.json("/v1/images", reference=embedding, **settings).json()["lora"]["similarity"]
    assert -1 <= scored <= 1
    assert api.json("/v1/images", **settings).json()["lora"]["similarity"] is None
    form = {"reference": ("x", json.dumps(embedding))}
    assert api("POST", "/v1/images", files=form, data=settings).json()["lora"]["similarity"] == scored
    opposite = api.json("/v1/images", reference=[-value for value in embedding], **settings).json()["lora"]
    assert opposite["similarity"] == pytest.approx(-scored, abs=1e-5)
    short = problem(api.json("/v1/images", reference=[1.0], **settings), 422, "invalid_request")
    assert short["detail"].startswith("reference has 1 numbers")


def test_likeness_comes_with_landmarks_on_one_scale(api: Client, embedding: list[float]) -> None:
    photos = [("photo", ("a", ADA.read_bytes())), ("photo", ("b", ADA_AGAIN.read_bytes()))]
    settings = {**DRAWN, "num_images": 2, "seed": 1}
    two = api("POST", "/v1/likeness", files=photos, data=settings).json()
    assert set(two) == {"base", "nearest", "lora", "photos", "left_out"}
    assert two["left_out"] == []
    assert two["photos"] == pytest.approx(
        np.dot(embedding, api.form("/v1/embeddings", ADA_AGAIN).json()["photos"][0]["faces"][0]["embedding"]), abs=1e-5
    )
    one = api.json("/v1/likeness", embedding=embedding, **settings).json()
    assert one["photos"] is None
    same = api.json("/v1/images", embedding=embedding, **settings).json()["lora"]["similarity"]
    assert one["lora"] == pytest.approx(same, abs=1e-5)
    base = api.json("/v1/images", embedding=embedding, lora_scale=0, **settings).json()["lora"]["similarity"]
    assert one["base"] == pytest.approx(base, abs=1e-5)


def test_faces_tell_why_there_is_none_that_can_be_used(api: Client) -> None:
    file = io.BytesIO()
    Image.new("RGB", (80, 80)).save(file, "PNG")
    photo = api.form("/v1/embeddings", file.getvalue()).json()["photos"][0]
    assert (photo["faces"], photo["reason"]) == ([], "no_face")
    assert photo["detail"].startswith("The photo shows no face")
    assert api.form("/v1/embeddings", ADA).json()["photos"][0]["reason"] is None


def test_the_words_of_a_model_that_knows_few_are_told(api: Client) -> None:
    words = api("GET", "/v1/model").json()["base"]["words"]
    assert {"beach", "smiling", "sks", "person"} <= set(words)
    assert not {"astronaut", "hat"} & set(words)
