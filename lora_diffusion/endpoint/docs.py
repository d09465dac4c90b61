"""OpenAPI: forms beside JSON, every status of every operation with an example, and who may ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from lora_diffusion.endpoint import schemas
from lora_diffusion.endpoint.access import DELETION_TOKEN, TOKEN
from lora_diffusion.endpoint.body import JSON_FIELDS
from lora_diffusion.endpoint.examples import EVENTS, EXAMPLES
from lora_diffusion.endpoint.middleware import TIMEOUT
from lora_diffusion.endpoint.problems import MEDIA_TYPE, PHOTO_REASONS, ApiError
from lora_diffusion.endpoint.routing import Route

DESCRIPTION = (
    "One photo of a face in, a LoRA for Stable Diffusion and pictures out. Errors are RFC 9457 problem documents."
)
TAGS = {"people": "from photos to codes", "LoRAs": "make, fetch, change, mix", "pictures": "draw", "server": "state"}
REF = "#/components/schemas/{model}"
ALWAYS = ("invalid_request", "wrong_host", "internal_error", "deadline_exceeded")
WITH_KEY = ("unauthorized", "foreign_origin", "rate_limited", "overloaded")
WITH_BODY = ("malformed_body", "slow_body", "body_too_large", "unsupported_media_type")
WITH_PHOTOS = PHOTO_REASONS
BINARY = {"schema": {"type": "string", "format": "binary"}, "example": "(the file's bytes)"}
LORA_FILES = {"application/octet-stream": BINARY, "application/zip": BINARY}
PICTURES = {
    **{f"image/{name}": BINARY for name in ("png", "jpeg", "webp")},
    "text/event-stream": {"schema": {"type": "string"}, "example": EVENTS},
}


def operation(
    tag: str,
    summary: str,
    answer: type[BaseModel] | None,
    reasons: Sequence[str] = (),
    *,
    request: type[BaseModel] | None = None,
    status: int = 200,
    files: dict[str, Any] | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """Arguments of FastAPI's `get`, `post` and `delete`. reasons: of refusals, besides those of every route of its kind."""
    reasons = (*reasons, *ALWAYS, *(() if public else WITH_KEY), *(WITH_BODY if request else ()))
    responses = problems(reasons)
    if files:
        responses[200] = {"description": "The file itself, where it was asked for.", "content": files}
    if answer and answer.__name__ in EXAMPLES:
        told = responses.setdefault(status, {"description": "What was asked for."})
        told["content"] = {"application/json": {"example": EXAMPLES[answer.__name__]}, **told.get("content", {})}
    options: dict[str, Any] = {"tags": [tag], "summary": summary, "status_code": status, "responses": responses}
    if request:
        options["openapi_extra"] = {"requestBody": {"content": _bodies(request)}}
    return {**options, "response_model": answer}


def problems(reasons: Sequence[str]) -> dict[int | str, dict[str, Any]]:
    """status -> response, with an example for each reason."""
    found: dict[int | str, dict[str, Any]] = {}
    for problem in map(ApiError, dict.fromkeys(reasons)):
        content = {"schema": {"$ref": REF.format(model="Problem")}, "examples": {}}
        response = found.setdefault(problem.status, {"description": "", "content": {MEDIA_TYPE: content}})
        response["description"] += f"{', ' if response['description'] else ''}`{problem.reason}`"
        response["content"][MEDIA_TYPE]["examples"][problem.reason] = {"value": problem.document("6fd1c7b2a0e94f35")}
        if problem.status in (429, 503):
            response["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return found


def _bodies(schema: type[BaseModel]) -> dict[str, Any]:
    """A request as JSON, and as a form: there files are files, and what is nested is JSON text."""
    own, example = schema.model_json_schema(), EXAMPLES[schema.__name__]
    properties = {}
    for name, value in own["properties"].items():
        if name == "photos":
            properties["photo"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
        elif name == "lora_file":
            properties[name] = {"type": "string", "format": "binary"}
        elif name in JSON_FIELDS:
            properties[name] = {"type": "string", "description": "JSON"}
        else:
            properties[name] = value
    required = ["photo" if name == "photos" else name for name in own.get("required", [])]
    form = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    plain = {k: json.dumps(v) if k in JSON_FIELDS else v for k, v in example.items()}
    if photos := plain.pop("photos", None):
        plain["photo"] = ["(the file's bytes)"] * len(photos)
    return {"application/json": {"example": example}, "multipart/form-data": {"schema": form, "example": plain}}


def describe(app: FastAPI) -> None:
    """Give `app` its OpenAPI document, built at the first look."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            tags = [{"name": name, "description": text} for name, text in TAGS.items()]
            document = get_openapi(
                title=app.title, version=app.version, description=DESCRIPTION, tags=tags, routes=app.routes
            )
            components = document.setdefault("components", {})
            components["schemas"]["Problem"] = schemas.Problem.model_json_schema()
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            for route in app.routes:
                if isinstance(route, Route) and route.include_in_schema:
                    for method in route.methods or ():
                        _describe(document["paths"][route.path][method.lower()], route.public)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(operation: dict[str, Any], public: bool) -> None:
    seconds = {"type": "number", "exclusiveMinimum": 0}
    text = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
    operation.setdefault("parameters", []).extend(
        [
            {"in": "header", "name": TIMEOUT, "schema": seconds, "description": "how long you wait"},
            {"in": "header", "name": "X-Request-Id", "schema": text, "description": "comes back in the answer"},
        ]
    )
    if not public:
        token = {"type": "string", "pattern": TOKEN.pattern}
        told = "yours, for what you make and DELETE; left out: a new one, told in the answer. Not needed with keys"
        operation["parameters"].append({"in": "header", "name": DELETION_TOKEN, "schema": token, "description": told})
        operation["security"] = [{"bearer": []}, {"header": []}, {}]
