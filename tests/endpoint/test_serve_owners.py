"""Whose a LoRA is: two people make the same one, and neither takes it from the other."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serve_client import ADA, Client, problem, variant

from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.errors import ServingError

MADE = {"seed": 4711, "latent_inference_steps": 3}
A, B = {"X-API-Key": "a"}, {"X-API-Key": "b"}


@pytest.fixture
def keyed(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("LORA_DIFFUSION_API_KEYS", "a,b")
    return variant(studio)


def make(client: Client, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = client.form("/v1/loras", headers=headers, **{**MADE, **fields})
    assert answer.status_code == 201, answer.text
    lora: dict[str, Any] = answer.json()["loras"][0]
    return lora


def upload(client: Client, data: bytes, headers: dict[str, str] | None = None) -> dict[str, Any]:
    lora: dict[str, Any] = client("POST", "/v1/loras", files={"lora_file": ("x", data)}, headers=headers).json()[
        "loras"
    ][0]
    return lora


def test_an_upload_of_anothers_file_takes_neither_the_latent_nor_the_lora(api: Client) -> None:
    made = make(api)
    theirs = upload(api, api("GET", made["files"]["vector"]).content)
    assert theirs["id"] != made["id"]
    edit = {"edits": {"smile": 1}}
    problem(api.json("/v1/edits", lora=theirs["id"], **edit), 409, "stale_latent")  # the file does not hold the latent
    assert api.json("/v1/edits", lora=made["id"], **edit).status_code == 201
    assert delete(api, theirs).status_code == 204
    assert api.json("/v1/edits", lora=made["id"], **edit).status_code == 201
    problem(delete(api, {**made, "deletion_token": theirs["deletion_token"]}), 403, "not_yours")
    assert delete(api, made).status_code == 204
    problem(api("GET", made["url"]), 404, "unknown_lora")


def delete(client: Client, lora: dict[str, Any]) -> httpx.Response:
    return client("DELETE", lora["url"], headers={"X-Deletion-Token": lora["deletion_token"]})


def test_people_whose_vectors_are_equal_keep_their_latents(api: Client) -> None:
    """At scale 0 everybody's LoRA is the corpus' mean: one id for all would give each the latent of whoever came last."""
    mine, theirs = (make(api, deviation_scale=0, seed=seed) for seed in (4716, 4717))
    vectors = [api("GET", lora["files"]["vector"]).content for lora in (mine, theirs)]
    assert vectors[0] == vectors[1]
    assert mine["id"] != theirs["id"]
    latents = [api("GET", lora["files"]["latent"]).content for lora in (mine, theirs)]
    assert latents[0] != latents[1]


@pytest.mark.parametrize("fails", ["score", "latent", "pictures"])
def test_a_request_that_fails_leaves_no_lora_that_nobody_can_delete(api: Client, studio: Studio, fails: str) -> None:
    kept = lambda: api.loop.run_until_complete(studio.library.stats())["loras"]  # noqa: E731
    of, file = latent(api), api("GET", make(api, seed=4715)["files"]["kohya"]).content
    before = kept()
    if fails == "score":
        problem(api.json("/v1/loras", latent=of, score=True, deviation_scale=0.123), 422, "invalid_request")
    elif fails == "latent":
        form = {"files": {"lora_file": ("x", file)}, "data": {"format": "latent"}}
        problem(api("POST", "/v1/loras", **form), 409, "stale_latent")
    else:

        class Broken:
            async def draw(self, *_: Any) -> Any:
                raise ServingError("overloaded", "busy")
                yield

        broken = variant(studio, stages={"renderer": Broken()})
        problem(broken.form("/v1/personalize", prompt="a", seed=4714), 503, "overloaded")
    assert kept() == before


def test_who_sends_a_token_deletes_with_it_what_was_made_twice(api: Client) -> None:
    mine = {"X-Deletion-Token": "5" * 32}
    made = [make(api, mine), make(api, mine), *api.json("/v1/loras", mine, latent=latent(api)).json()["loras"]]
    assert {lora["deletion_token"] for lora in made} == {"5" * 32}
    for lora in {lora["url"]: lora for lora in made}.values():
        assert delete(api, lora).status_code == 204
        problem(api("GET", lora["url"]), 404, "unknown_lora")


def latent(api: Client) -> Any:
    return api.form("/v1/latents", seed=4712, latent_inference_steps=3).json()["latents"][0]["latent"]


@pytest.mark.parametrize("token", ["", "x", "5" * 31, "G" * 32, "5" * 65])
def test_a_token_that_could_be_guessed_is_refused(api: Client, token: str) -> None:
    problem(api("GET", "/v1/model", headers={"X-Deletion-Token": token}), 422, "invalid_request")


def test_files_and_pictures_bring_their_token(api: Client) -> None:
    options = {**MADE, "seed": 4713}
    file = api.form("/v1/loras", **options, format="kohya")
    url, token = f"/v1/loras/{file.headers['x-lora-id']}", file.headers["x-lora-deletion-token"]
    picture = {"prompt": "a", "num_inference_steps": 2, **options}
    image = api.form("/v1/images", headers={"Accept": "image/png"}, **picture)
    assert image.headers["x-lora-id"] == file.headers["x-lora-id"]
    for one in (token, image.headers["x-lora-deletion-token"]):
        assert api("DELETE", url, headers={"X-Deletion-Token": one}).status_code == 204
    problem(api("GET", url), 404, "unknown_lora")


def test_who_has_only_the_id_is_not_told_the_token(api: Client) -> None:
    made = make(api)
    assert api("GET", made["url"]).json()["deletion_token"] is None
    drawn = api.json("/v1/images", prompt="a", lora=made["id"], num_inference_steps=2).json()
    assert drawn["lora"]["deletion_token"] is None


def test_with_keys_a_lora_is_its_keys_alone(keyed: Client) -> None:
    mine, theirs = make(keyed, A), make(keyed, B)
    assert mine["id"] == theirs["id"]  # the same content
    assert mine["deletion_token"] is None
    url = mine["url"]
    assert keyed("DELETE", url, headers=B).status_code == 204
    problem(keyed("GET", url, headers=B), 404, "unknown_lora")
    problem(keyed("GET", f"{url}?format=kohya", headers=B), 404, "unknown_lora")
    problem(keyed("DELETE", url, headers=B), 404, "unknown_lora")
    of_a = {"lora": mine["id"]}
    problem(keyed.json("/v1/images", B, prompt="a", **of_a), 404, "unknown_lora")
    problem(keyed.json("/v1/edits", B, edits={"smile": 1}, **of_a), 404, "unknown_lora")
    problem(keyed.json("/v1/interpolations", B, a=of_a, b=of_a, num=2), 404, "unknown_lora")
    file = keyed("GET", f"{url}?format=vector", headers=A)
    assert file.status_code == 200
    uploaded = upload(keyed, file.content, B)
    problem(
        keyed.json("/v1/edits", B, edits={"smile": 1}, lora=uploaded["id"]), 409, "stale_latent"
    )  # the latent is A's
    assert keyed.json("/v1/edits", A, edits={"smile": 1}, **of_a).status_code == 201
    assert keyed.json("/v1/images", A, prompt="a", num_inference_steps=2, **of_a).status_code == 200
    assert keyed.form("/v1/personalize", ADA, A, prompt="a", num_inference_steps=2, **MADE).status_code == 200
