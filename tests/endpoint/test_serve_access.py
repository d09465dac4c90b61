"""Who may ask: decided by the route that answers, however its path was written."""

from __future__ import annotations

import pytest
from serve_client import Client, problem, variant

from lora_diffusion.endpoint.access import read_keys
from lora_diffusion.endpoint.graph import build
from lora_diffusion.endpoint.routing import Route
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.config import AccessConfig

KEYS = "LORA_DIFFUSION_API_KEYS"
LORA = f"/v1/loras/{'0' * 32}"
CLOSED = [
    *(("POST", f"/v1/{name}") for name in ("embeddings", "latents", "loras", "images", "personalize", "edits")),
    ("POST", "/v1/interpolations"),
    ("GET", "/v1/model"),
    ("HEAD", "/v1/model"),
    ("GET", LORA),
    ("DELETE", LORA),
    ("GET", f"{LORA}?format=peft"),
]
ODD_WAYS = [
    "{}",
    "{}/",
    "/%76%31{}",
    "//v1{}",
    "/x/..{}",
    "/./{}",
    "/V1{}",
    "/v1/{}",
    "{};a",
    "{}%2f",
    "{}%00",
    "/v1%2F{}",
]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, "first, second")


@pytest.fixture(params=["", "/lora", "/v1", "/v1/loras"])
def guarded(studio: Studio, keys: None, request: pytest.FixtureRequest) -> tuple[Client, str]:
    return variant(studio, root_path=request.param), request.param


def test_without_a_key_nothing_works_wherever_it_is_mounted(guarded: tuple[Client, str]) -> None:
    client, root = guarded
    for method, path in CLOSED:
        answer = client(method, root + path, json={"embedding": [1.0] * 512} if method == "POST" else None)
        assert answer.status_code == 401, (method, path)
        if method != "HEAD":
            problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/metrics", "/style.css"):
        assert client("GET", root + path).status_code == 200, path


@pytest.mark.parametrize("way", ODD_WAYS)
def test_no_spelling_of_a_path_gets_round_the_key(studio: Studio, keys: None, way: str) -> None:
    for root in ("", "/lora"):
        client = variant(studio, root_path=root)
        for method in ("GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS"):
            for path in ("/v1/loras", "/v1/model", LORA):
                spelled = way.format(path.removeprefix("/v1") if "v1" in way.lower() else path)
                assert client(method, root + spelled).status_code in (401, 404, 405), (method, spelled)


def test_a_key_opens(guarded: tuple[Client, str]) -> None:
    client, root = guarded
    for headers in ({"Authorization": "Bearer second"}, {"Authorization": "bearer  first"}, {"X-API-Key": "first"}):
        assert client("GET", root + LORA, headers=headers).json()["reason"] == "unknown_lora"
    for wrong in ("Bearer third", "Bearer", "Bearer first,second", "Bearer first second", "Basic first", ""):
        problem(client("GET", f"{root}/v1/model", headers={"Authorization": wrong}), 401, "unauthorized")


def test_every_route_is_closed_unless_it_says_that_it_is_public(api: Client) -> None:
    routes = [route for route in api.app.routes if getattr(route, "path", "") != "/openapi.json"]
    assert all(isinstance(route, Route) for route in routes)
    opened = {route.path for route in routes if isinstance(route, Route) and route.public}
    assert {"/healthz", "/readyz", "/metrics", "/", "/docs"} < opened
    assert not any(path.startswith("/v1") for path in opened)


def test_a_new_route_is_closed(studio: Studio, keys: None) -> None:
    client = variant(studio)

    @client.app.get("/secret")
    async def secret() -> str:
        return "told"

    problem(client("GET", "/secret"), 401, "unauthorized")
    assert client("GET", "/secret", headers={"X-API-Key": "first"}).json() == "told"


@pytest.mark.parametrize("value", ["", " ", ",", " , ", "one two", "schlüssel", "a,b\tc"])
def test_keys_that_nobody_could_send_are_an_error_at_the_start(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(KEYS, value)
    with pytest.raises(ValueError, match=KEYS):
        variant(studio)
    with pytest.raises(ValueError, match=KEYS):
        build({})


def test_only_without_the_variable_everybody_may_ask(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)
    assert read_keys(AccessConfig()) == []
    assert api("GET", "/v1/model").status_code == 200
