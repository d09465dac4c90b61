"""OpenAPI: what the body-reading routes accept, which FastAPI cannot see, and problem documents as their errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve import schemas
from serve.body import JSON_FIELDS
from serve.problems import MEDIA_TYPE

REF = "#/components/schemas/{model}"
FILES = {"photos": "photo", "lora_file": "lora_file"}


def accepts(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `schema` as JSON or as a form."""
    form = schema.__name__.replace("Request", "Form")
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": REF.format(model=schema.__name__)}},
                "multipart/form-data": {"schema": {"$ref": REF.format(model=form)}},
            },
        }
    }


def describe(app: FastAPI, description: str) -> None:
    """Give `app` its OpenAPI document, built at the first look."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            for schema in _requests():
                own = schema.model_json_schema(ref_template=REF)
                components.update(own.pop("$defs", {}))
                components[schema.__name__] = own
                components[schema.__name__.replace("Request", "Form")] = _form(own)
            components["Problem"] = schemas.Problem.model_json_schema(ref_template=REF)
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = {
                        "description": "a problem document (RFC 9457)",
                        "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(model="Problem")}}},
                    }
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _requests() -> list[type[BaseModel]]:
    kinds = [getattr(schemas, name) for name in dir(schemas) if name.endswith("Request") and name != "Request"]
    return sorted(kinds, key=lambda kind: str(kind.__name__))


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    """The same request as a form: files are files, what is nested is JSON text."""
    properties = {}
    for name, value in schema["properties"].items():
        if name == "photos":
            properties["photo"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
        elif name == "lora_file":
            properties[name] = {"type": "string", "format": "binary"}
        elif name in JSON_FIELDS:
            properties[name] = {"type": "string", "description": "JSON"}
        else:
            properties[name] = value
    required = [FILES.get(name, name) for name in schema.get("required", [])]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}
