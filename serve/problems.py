"""Errors as RFC 9457 problem documents: what happened, why, and what to do."""

from __future__ import annotations

import difflib
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from lora_diffusion.faces.photos import PhotoError
from lora_diffusion.serving.errors import ServingError

MEDIA_TYPE = "application/problem+json"
STATUS = {
    "malformed_body": 400,
    "unauthorized": 401,
    "not_found": 404,
    "unknown_lora": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "slow_body": 408,
    "stale_latent": 409,
    "body_too_large": 413,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
    "internal_error": 500,
    "overloaded": 503,
    "not_ready": 503,
    "deadline_exceeded": 504,
}
"""reason -> status; what is not here is 422: understood, but unusable."""
TITLES = {422: "Unprocessable request", 413: "Content too large"}


class ApiError(Exception):
    """An answer that is a problem document."""

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        headers: dict[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.headers = headers or {}
        self.errors = errors

    @property
    def status(self) -> int:
        return STATUS.get(self.reason, 422)

    def document(self, request_id: str | None = None) -> dict[str, Any]:
        return {
            "type": f"urn:lora-diffusion:problem:{self.reason.replace('_', '-')}",
            "title": TITLES.get(self.status) or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "reason": self.reason,
            **({"request_id": request_id} if request_id else {}),
            **({"errors": self.errors} if self.errors else {}),
        }

    def response(self, request_id: str | None = None) -> JSONResponse:
        return JSONResponse(self.document(request_id), self.status, self.headers, MEDIA_TYPE)


def as_problem(error: BaseException, retry_after_seconds: float) -> ApiError | None:
    """The problem that an error of the stages makes, or None for one that is our own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError("deadline_exceeded", "The request's time was up. Allow it more time, or ask for less.")
    if isinstance(error, PhotoError | ServingError):
        problem = ApiError(error.reason, str(error))
        if problem.status == 503:
            problem.headers["Retry-After"] = f"{max(1, round(retry_after_seconds))}"
        return problem
    return None


def invalid(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """What is wrong with a body, place by place, without repeating what was sent: it may be a face."""
    errors = [
        {"where": ".".join(str(part) for part in e["loc"]), "message": _message(e, schema)}
        for e in error.errors(include_url=False, include_input=False, include_context=False)[:20]
    ]
    first = errors[0]
    where = f"{first['where']}: " if first["where"] else ""
    return ApiError("invalid_request", f"{where}{first['message']}", errors=errors)


def _message(error: ErrorDetails, schema: type[BaseModel]) -> str:
    if error["type"] != "extra_forbidden":
        return error["msg"].removeprefix("Value error, ")
    known = list(schema.model_fields) if len(error["loc"]) == 1 else []
    close = difflib.get_close_matches(str(error["loc"][-1])[:64], known, n=1)
    return f"there is no such field here{f'; did you mean {close[0]}?' if close else ''}"
