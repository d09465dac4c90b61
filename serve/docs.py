"""OpenAPI: requests as forms, and problem documents as their errors, beside what FastAPI sees by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve import schemas
from serve.body import JSON_FIELDS
from serve.problems import MEDIA_TYPE

FILES = {"photos": "photo", "lora_file": "lora_file"}


def form_of(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `schema` as a form, too: files are files, what is nested is JSON text."""
    own = schema.model_json_schema()
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
    required = [FILES.get(name, name) for name in own.get("required", [])]
    form = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": form}}}}


def describe(app: FastAPI, description: str) -> None:
    """Give `app` its OpenAPI document, built at the first look."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            components["Problem"] = schemas.Problem.model_json_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = {
                        "description": "a problem document (RFC 9457)",
                        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
                    }
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
