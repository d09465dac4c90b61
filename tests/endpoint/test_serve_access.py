"""Who may ask: decided by the route that answers, however its path was written."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_client import Client, problem, variant
from starlette.datastructures import Headers

from lora_diffusion.endpoint import access
from lora_diffusion.endpoint.access import WRONG_KEYS, is_loopback, read_keys, refuse_open_door
from lora_diffusion.endpoint.graph import build
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.endpoint.routing import Route
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.jobs import serve
from lora_diffusion.serving.config import AccessConfig, LimitsConfig

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


def test_keys_may_stand_in_a_file(studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEYS, raising=False)
    file = tmp_path / "keys"
    access = AccessConfig(api_keys_file=str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        variant(studio, access=access)
    file.write_text("\n")
    with pytest.raises(ValueError, match="api_keys_file is set, but holds no key"):
        variant(studio, access=access)
    file.write_text("first\nsecond\n")
    client = variant(studio, access=access)
    problem(client("GET", "/v1/model"), 401, "unauthorized")
    assert client("GET", "/v1/model", headers={"X-API-Key": "second"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "cluster.example", ""])
def test_without_keys_it_listens_to_this_machine_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)
    with pytest.raises(ValueError, match="let everybody in"):
        refuse_open_door(AccessConfig(), host)
    refuse_open_door(AccessConfig(open=True), host)
    with pytest.raises(ValueError, match="let everybody in"):
        serve.run(serve.Config(host=host), "local")
    monkeypatch.setenv(KEYS, "first")
    refuse_open_door(AccessConfig(), host)


def test_loopback_has_many_names() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "a.localhost")))
    assert not any(map(is_loopback, ("127.0.0.1.example", "localhost.example", "10.0.0.1", "::", "*")))


def test_wrong_keys_are_slowed_and_counted_and_shut_nobody_out_who_was_in(studio: Studio, keys: None) -> None:
    client = variant(studio)
    before = _wrong_keys(client)
    right = {"X-API-Key": "first"}
    assert client("GET", "/v1/model", headers=right).status_code == 200
    for i in range(WRONG_KEYS):
        problem(client("GET", "/v1/model", headers={"X-API-Key": f"guess {i}"}), 401, "unauthorized")
    told = client("GET", "/v1/model", headers={"X-API-Key": "guess"})
    problem(told, 429, "rate_limited")
    assert 1 <= int(told.headers["retry-after"]) <= 60
    problem(
        client("GET", "/v1/model", headers={"X-API-Key": "second"}), 429, "rate_limited"
    )  # a guess, for all we know
    assert client("GET", "/v1/model", headers=right).status_code == 200
    assert _wrong_keys(client) == before + WRONG_KEYS


def _wrong_keys(client: Client) -> float:
    lines = client("GET", "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("lora_diffusion_wrong_keys_total"))


def test_asking_without_a_key_is_no_guess(studio: Studio, keys: None) -> None:
    client = variant(studio)
    for _ in range(WRONG_KEYS + 1):
        problem(client("GET", "/v1/model"), 401, "unauthorized")


def closed_routes(client: Client) -> list[tuple[str, str]]:
    """Method and path of every route that is work, from the application itself."""
    routes = [route for route in client.app.routes if isinstance(route, Route) and not route.public]
    return [
        (method, route.path.replace("{lora_id}", "0" * 32))
        for route in routes
        for method in sorted(route.methods or ())
    ]


@pytest.mark.parametrize("root", ["", "/lora"])
@pytest.mark.parametrize("way", ["{}", "{}/", "/{}", "{}//", "{}%2f", "{}?format=peft", "{}#a", "HEAD {}"])
@pytest.mark.parametrize(
    ("bound", "reason", "changes"),
    [
        ("room", "overloaded", {"max_in_flight": 0}),
        ("rate", "rate_limited", {"requests_per_minute": 1, "burst": 0}),
    ],
)
def test_room_and_rates_hold_under_every_path_that_a_route_answers(
    studio: Studio, root: str, way: str, bound: str, reason: str, changes: dict[str, Any]
) -> None:
    """A path that is not refused for its bound must be one that nothing answers."""
    part = "limits" if bound == "room" else "access"
    full = variant(studio, root_path=root, **{part: replace(getattr(studio.config, part), **changes)})
    assert len(closed_routes(full)) >= 10
    for method, path in closed_routes(full):
        method = "HEAD" if way.startswith("HEAD") and method == "GET" else method
        answer = full(method, root + way.removeprefix("HEAD ").format(path), json={} if method == "POST" else None)
        if way in ("{}", "{}/", "{}?format=peft", "{}#a", "HEAD {}"):
            assert answer.status_code in (429, 503), (method, path)
        if method != "HEAD":
            assert answer.json()["reason"] in (reason, "not_found"), (method, path)


def test_who_has_left_takes_up_no_room() -> None:
    """Whether or not its body had been read."""
    room = access.AdmissionControl(LimitsConfig(max_in_flight=1), Metrics())
    for _ in range(3 * access.UPLOADS_FOR_EACH):
        with room.admitted() as begin:
            begin()
        with room.admitted():
            pass


def test_a_key_that_another_address_uses_is_a_guess_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIFFUSION_API_KEYS", "right,spare")
    door = access.Access(AccessConfig(), Metrics())
    right = Headers({"x-api-key": "right"})
    owner = door.check(right, "1.1.1.1")
    for i in range(WRONG_KEYS):
        with pytest.raises(ApiError, match="key"):
            door.check(Headers({"x-api-key": f"guess {i}"}), "2.2.2.2")
    with pytest.raises(ApiError, match="Too many wrong keys"):
        door.check(right, "2.2.2.2")
    assert door.check(right, "1.1.1.1") == door.check(right, "3.3.3.3") == owner, "a key's, wherever it is used"


def test_a_bucket_holds_no_more_than_its_burst_and_the_caller_longest_away_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    monkeypatch.setattr(access, "MAX_CALLERS", 2)
    bucket = access.Buckets(per_minute=60, burst=2)
    for caller in (b"a", b"a"):
        bucket.take(caller)
    assert bucket.wait(b"a") == 1
    now = 3600.0  # an hour's worth is not saved
    for caller in (b"a", b"a", b"b", b"b", b"a"):
        bucket.take(caller)
    assert bucket.wait(b"a") == 1
    bucket.take(b"c")  # b has asked longest ago
    assert (bucket.wait(b"a"), bucket.wait(b"b")) == (1, 0)


def test_who_was_slow_once_is_not_slow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight slow bodies, one after the other, would end every later one of that caller."""
    monkeypatch.setattr(access, "SLOW_SECONDS", 0.01)
    bodies = access.SlowBodies()

    async def slow() -> None:
        async with asyncio.timeout(60) as timeout:
            with bodies.watched("ada", timeout):
                await asyncio.sleep(0.05)

    async def scenario() -> None:
        for _ in range(access.SLOW_BODIES + 2):
            await slow()

    asyncio.run(scenario())
