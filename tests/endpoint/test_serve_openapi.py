"""The OpenAPI description: every operation in words, every status with an example that is one."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from serve_client import Client

from lora_diffusion.endpoint import schemas
from lora_diffusion.endpoint.body import JSON_FIELDS
from lora_diffusion.endpoint.examples import EXAMPLES
from lora_diffusion.endpoint.problems import PROBLEMS, ApiError
from lora_diffusion.faces.photos import PhotoReason
from lora_diffusion.serving.errors import Reason


@pytest.fixture(scope="module")
def document(api: Client) -> dict[str, Any]:
    described: dict[str, Any] = api("GET", "/openapi.json").json()
    return described


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{m} {path}", o) for path, methods in document["paths"].items() for m, o in methods.items()]


def test_every_operation_says_what_it_does(document: dict[str, Any]) -> None:
    known = {tag["name"] for tag in document["tags"]}
    for name, operation in operations(document):
        assert operation["summary"], name
        assert set(operation["tags"]) <= known, name
        assert {parameter["name"] for parameter in operation["parameters"]} >= {"X-Request-Timeout-Seconds"}
        assert bool(operation.get("security")) == ("/v1/" in name), name
    assert len({operation["summary"] for _, operation in operations(document)}) == len(operations(document))


def test_every_status_and_every_request_has_an_example(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        bodies = list(operation.get("requestBody", {}).get("content", {}).items())
        for status, response in operation["responses"].items():
            assert response["description"], (name, status)
            assert response.get("content") or status == "204", (name, status)
            bodies += response.get("content", {}).items()
        for media_type, body in bodies:
            assert body.get("example") or body.get("examples"), (name, media_type)
            assert body["schema"], (name, media_type)


def test_examples_are_valid() -> None:
    for name, example in EXAMPLES.items():
        model = getattr(schemas, name)
        assert model.model_validate(example).model_dump(exclude_unset=True).keys() == example.keys(), name


@pytest.mark.parametrize("status", [401, 422, 429, 503, 504, 500])
def test_a_route_with_a_key_may_answer_all_of_these(document: dict[str, Any], status: int) -> None:
    for name, operation in operations(document):
        assert str(status) in operation["responses"] or "/v1/" not in name, name


def test_every_reason_has_a_status_and_words() -> None:
    for reason in (*get_args(Reason), *PROBLEMS):
        problem = ApiError(reason).document()
        assert problem["status"] == PROBLEMS[reason][0]
        assert problem["detail"]
    assert {ApiError(reason).status for reason in get_args(PhotoReason)} == {422, 413}


def test_a_form_holds_every_value_that_is_not_plain_as_json() -> None:
    """`reference` was forgotten: a form with it was always refused."""
    nested = set()
    for name in EXAMPLES:
        if name.endswith("Request"):
            for field, told in getattr(schemas, name).model_json_schema()["properties"].items():
                kinds = [told, *told.get("anyOf", [])]
                if any(kind.get("type") in ("array", "object") or "$ref" in kind for kind in kinds):
                    nested.add(field)
    assert nested - {"photos"} == JSON_FIELDS
