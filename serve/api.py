"""The HTTP side as one FastAPI application over a Studio: with Ray behind it, or all in one process."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException

from lora_diffusion import __version__
from lora_diffusion.faces.photos import PhotoError
from lora_diffusion.serving.errors import ServingError
from serve.docs import describe
from serve.guard import Guard
from serve.problems import ApiError, as_problem
from serve.routes import Routes
from serve.studio import Studio, together

log = logging.getLogger("lora_diffusion.serve")
STATIC = Path(__file__).parent / "static"
READY_SECONDS = 5.0
CSP = "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
DESCRIPTION = (
    "One photo of a face in, a LoRA for Stable Diffusion and pictures out. Errors are RFC 9457 problem documents."
)


def build_api(studio: Studio) -> FastAPI:
    """The application with all its routes."""
    app = FastAPI(title="LoRA Diffusion", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(Routes(studio).router)
    _add_operations(app, studio)
    _add_page(app)
    _add_docs(app)
    _add_problems(app, studio)
    describe(app, DESCRIPTION)
    app.add_middleware(Guard, config=studio.config, metrics=studio.metrics)
    if studio.config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(studio.config.access.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Timeout-Seconds"],
        )
    return app


def _add_operations(app: FastAPI, studio: Studio) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """All stages answer."""
        stages = (studio.embedder, studio.denoiser, studio.decoder, studio.renderer, studio.library)
        try:
            async with asyncio.timeout(READY_SECONDS):
                await together(stage.ready() for stage in stages)
        except (TimeoutError, ServingError):
            raise ApiError(
                "not_ready", "Some stages do not answer yet. Try again a little later.", headers={"Retry-After": "2"}
            ) from None
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], include_in_schema=False)
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
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return page


def _add_problems(app: FastAPI, studio: Studio) -> None:
    """What a request can do wrong is answered with a problem document; the guard does so for errors of ours."""

    async def problem(request: Request, error: Exception) -> Response:
        answer = as_problem(error, studio.config.limits.retry_after_seconds)
        assert answer is not None
        return answer.response(request.state.request_id)

    async def http_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed_body")
        detail = {"not_found": "There is nothing here; /docs lists what there is."}.get(reason, str(error.detail))
        headers = dict(error.headers or {})
        return ApiError(reason, detail, headers=headers).response(request.state.request_id)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [{"where": ".".join(map(str, e["loc"][1:])), "message": e["msg"]} for e in error.errors()[:20]]
        detail = f"{errors[0]['where']}: {errors[0]['message']}"
        return ApiError("invalid_request", detail, errors=errors).response(request.state.request_id)

    for kind in (ApiError, ServingError, PhotoError, TimeoutError):
        app.add_exception_handler(kind, problem)
    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, invalid)
