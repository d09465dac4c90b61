"""The HTTP side as one FastAPI application over a Studio: with Ray behind it, or all in one process."""

from __future__ import annotations

import asyncio
import mimetypes
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match

from lora_diffusion import __version__
from lora_diffusion.endpoint import schemas
from lora_diffusion.endpoint.access import DELETION_TOKEN, Access, AdmissionControl, SlowBodies, read_keys
from lora_diffusion.endpoint.docs import describe, operation
from lora_diffusion.endpoint.middleware import TIMEOUT, Deadline, Errors, FixedHeaders, Lenient, Log, RequestId, Site
from lora_diffusion.endpoint.problems import ApiError, invalid
from lora_diffusion.endpoint.routes import Routes
from lora_diffusion.endpoint.routing import Gate, Route, public
from lora_diffusion.endpoint.studio import Studio
from lora_diffusion.serving.errors import ServingError

METHODS = ("GET", "HEAD", "POST", "DELETE")
EXPOSED = [
    "X-Request-Id",
    "X-LoRA-Id",
    "X-LoRA-Deletion-Token",
    "X-LoRA-Left-Out",
    "X-LoRA-Seed",
    "X-LoRA-Similarity",
    "X-Image-Seed",
    "Content-Disposition",
    "Retry-After",
]
STATIC = Path(__file__).parent / "static"
READY_SECONDS = 5.0
CSP = "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"


def build_api(studio: Studio, echo_request_id: bool = True) -> FastAPI:
    """The application with all its routes. echo_request_id: False where a proxy before it sends that header.

    Raises ValueError for keys that let everybody in by mistake.
    """
    limits, access = studio.config.limits, studio.config.access
    names = access.allowed_hosts or (() if read_keys(access) else ("localhost",))  # who has a key is no stranger's page
    layers = [
        Middleware(RequestId, echo=echo_request_id),
        Middleware(Log, metrics=studio.metrics),
        Middleware(FixedHeaders),
        Middleware(Errors, limits=limits, metrics=studio.metrics),
        Middleware(Site, names=names, origins=access.cors_origins),
        Middleware(Deadline, limits=limits),
        Middleware(Lenient),
    ]
    if access.cors_origins:
        layers.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(access.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id", DELETION_TOKEN, TIMEOUT],
                expose_headers=EXPOSED,
            ),
        )
    app = FastAPI(
        title="LoRA Diffusion",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=layers,
    )
    app.state.gate = Gate(
        Access(access, studio.metrics), AdmissionControl(limits, studio.metrics), SlowBodies(), limits, access.proxies
    )
    app.router.route_class = Route
    Routes(studio).add_to(app)
    _add_operations(app, studio)
    _add_page(app)
    _add_docs(app)
    _add_problems(app)
    describe(app)
    return app


def _add_operations(app: FastAPI, studio: Studio) -> None:
    def told(summary: str, *reasons: str) -> dict[str, Any]:
        return operation("server", summary, schemas.Status, reasons, public=True)

    @app.get("/healthz", **told("The gateway is alive"))
    @public
    async def healthz() -> schemas.Status:
        return schemas.Status(status="ok")

    @app.get("/readyz", **told("All stages answer", "not_ready"))
    @public
    async def readyz() -> schemas.Status:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await studio.ready()
        except (TimeoutError, ServingError) as error:
            told = str(error) if getattr(error, "reason", "") == "store_unavailable" else ""
            raise ApiError("not_ready", told, headers={"Retry-After": "2"}) from None
        return schemas.Status(status="ready")

    @app.get("/metrics", include_in_schema=False)
    @public
    async def metrics() -> Response:
        studio.metrics.library(await studio.library.stats())
        content, media_type = studio.metrics.exposition()
        return Response(content, media_type=media_type)


def _add_page(app: FastAPI) -> None:
    """`GET /` and its files, read once: no path that a client sends reaches the file system."""
    for path in sorted(STATIC.rglob("*")) if STATIC.is_dir() else []:
        if path.is_file():
            name = path.relative_to(STATIC).as_posix()
            media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            headers = {"Cache-Control": "no-cache", "Content-Security-Policy": CSP}
            for url in ("/", "/index.html") if name == "index.html" else (f"/{name}",):
                app.get(url, include_in_schema=False)(_constant(path.read_bytes(), media_type, headers))


def _add_docs(app: FastAPI) -> None:
    """`GET /docs`: FastAPI's own, with Swagger UI from the package `fastapi_offline` instead of a CDN."""
    files = resources.files("fastapi_offline") / "static"
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        page = _constant((files / name).read_bytes(), media_type, {"Cache-Control": "max-age=86400"})
        app.get(f"/docs/{name}", include_in_schema=False)(page)
    html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    app.get("/docs", include_in_schema=False)(_constant(bytes(html.body), "text/html", {"Cache-Control": "no-cache"}))


def _constant(content: bytes, media_type: str, headers: dict[str, str]) -> Any:
    @public
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return page


def _add_problems(app: FastAPI) -> None:
    """FastAPI's and Starlette's refusals as problem documents; `Errors` does so for everything else."""

    async def http_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            matching = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
            methods = {method for route in matching for method in getattr(route, "methods", ())}
            allowed = ", ".join(name for name in METHODS if name in methods or (name == "HEAD" and "GET" in methods))
            detail = f"This path takes {allowed}; {request.method} is none of them."
            answer = ApiError("method_not_allowed", detail, headers={"Allow": allowed})
        else:
            reason = "not_found" if error.status_code == 404 else "malformed_body"
            answer = ApiError(reason, "" if reason == "not_found" else str(error.detail))
        return answer.response(request.state.request_id)

    async def invalid_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        body = getattr(request.scope["route"], "body_field", None)
        schema = body.field_info.annotation if body else None
        return invalid(error.errors(), schema).response(request.state.request_id)

    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, invalid_request)
