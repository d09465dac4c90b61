"""Errors as RFC 9457 problem documents: what happened, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, get_args

from pydantic import BaseModel
from starlette.responses import JSONResponse

from lora_diffusion.faces.choice import FaceError, FaceReason
from lora_diffusion.faces.photos import PhotoError, PhotoReason
from lora_diffusion.serving.errors import ServingError

MEDIA_TYPE = "application/problem+json"
PROBLEMS = {
    "malformed_body": (400, "The body is no valid JSON: Expecting value, at line 1, column 1."),
    "unauthorized": (401, "This server wants an API key: send it as `Authorization: Bearer KEY`."),
    "not_yours": (
        403,
        "This LoRA is deleted with the deletion_token that came when it was made: send X-Deletion-Token.",
    ),
    "foreign_origin": (
        403,
        "A page of 'https://shop.example' may not ask 'lora.example'. Add it to access.cors_origins.",
    ),
    "not_found": (404, "There is nothing at this path; GET /docs lists what there is."),
    "unknown_lora": (404, "This LoRA has expired. Make it again."),
    "method_not_allowed": (405, "This path takes GET, HEAD, DELETE; PUT is none of them."),
    "not_acceptable": (406, "Accept application/json, text/event-stream, image/png, image/jpeg, image/webp."),
    "slow_body": (408, "The body did not arrive within 20 s."),
    "stale_latent": (409, "The latent belongs to a synthesiser that is not loaded. Make it again from the photo."),
    "body_too_large": (413, "At most 20 MB are accepted. Scale the photos down, or send fewer."),
    "wrong_host": (421, "This server does not answer to 'a.example'. Add the name to access.allowed_hosts."),
    "too_large": (413, "ada.png: The photo has 60 megapixels; at most 50 are decoded. Scale it down."),
    "unsupported_media_type": (415, "The body is of no type; send application/json, or multipart/form-data."),
    "invalid_request": (422, "sed: there is no such field here; did you mean seed?"),
    "no_face": (422, "ada.jpg shows no face that can be used. Take one where it is larger, frontal and lit."),
    "several_faces": (422, "ada.jpg shows 2 faces. Crop it to one person, or ask for the largest: faces=largest."),
    "different_people": (
        422,
        "The photos show different people (cosine of each with the others: ada.jpg 0.03, ben.jpg 0.03). "
        "Send photos of one person.",
    ),
    "bad_lora": (422, "The file is no LoRA for this base model: it is empty."),
    "unknown_attribute": (422, "No attribute 'hat'; there are: glasses, long hair, older."),
    "diverged": (422, "The synthesiser gave no finite LoRA. Try another seed, or less guidance."),
    "rate_limited": (429, "More than 60 requests a minute. Try again in 2 s."),
    "internal_error": (500, "An error of ours, noted under this request id. Try again."),
    "overloaded": (503, "64 requests are being worked on already. Try again a little later."),
    "store_unavailable": (503, "The store of LoRAs cannot be used at the moment. Try again a little later."),
    "not_ready": (503, "Some stages do not answer yet. Try again a little later."),
    "deadline_exceeded": (504, "The request's time was up. Allow it more time, or ask for less."),
}
"""reason -> status, and how its detail may read. Reasons that are not here, as those of unreadable photos, are 422."""
WORDS = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "is no whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "is no number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "is neither true nor false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "is no object of names and values"),
    "string_type": "is no text",
    "list_type": "is no list",
    "literal_error": "is none of {expected}",
    "greater_than_equal": "is below {ge}",
    "less_than_equal": "is above {le}",
    "too_short": "is empty: at least {min_length} is needed",
    "too_long": "has too many entries: at most {max_length} are read",
}
"""Kind of pydantic's error -> how we say it, after the name of the field."""
PHOTO_REASONS = (*get_args(FaceReason), *get_args(PhotoReason))
TITLES = {422: "Unprocessable request", 413: "Content too large"}


class ApiError(Exception):
    """An answer that is a problem document."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        headers: dict[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        self.reason = reason
        self.status, usual = PROBLEMS.get(reason, (422, "ada.jpg: The photo cannot be used."))
        self.detail = detail or usual
        self.headers = headers or {}
        self.errors = errors
        super().__init__(self.detail)

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
        return ApiError("deadline_exceeded")
    if isinstance(error, PhotoError | FaceError | ServingError):
        problem = ApiError(error.reason, str(error))
        if problem.status == 503:
            problem.headers["Retry-After"] = f"{max(1, round(retry_after_seconds))}"
        return problem
    return None


def invalid(errors: Sequence[Any], schema: type[BaseModel] | None = None) -> ApiError:
    """What is wrong with a request, place by place, without repeating what was sent: it may be a face.

    errors: pydantic's, with FastAPI's "body", "path" or "query" as the first part of each place.
    """
    told = [{"where": _where(e), "message": _message(e, schema)} for e in errors[:20]]
    first = told[0]
    return ApiError(
        "invalid_request", f"{first['where']}: {first['message']}" if first["where"] else first["message"], errors=told
    )


def _where(error: Any) -> str:
    """Half of a surrogate pair in a name cannot be answered as UTF-8."""
    return ".".join(str(part)[:64] for part in error["loc"][1:]).encode("utf-8", "replace").decode()


def _message(error: Any, schema: type[BaseModel] | None) -> str:
    kind, place = error["type"], error["loc"]
    if kind == "extra_forbidden":
        known = list(schema.model_fields) if schema and len(place) == 2 else []
        close = difflib.get_close_matches(str(place[-1])[:64], known, n=1)
        return f"there is no such field here{f'; did you mean {close[0]}?' if close else ''}"
    if kind == "missing":
        return "is missing"
    if kind == "string_pattern_mismatch":
        digits = error["ctx"]["pattern"].rpartition("{")[2].rstrip("}$")
        return f"is no id: an id has {digits} hexadecimal digits, as in the answer that gave it"
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else f"{bound:,}" if isinstance(bound, int) else bound
              for name, bound in error.get("ctx", {}).items()}  # fmt: skip
    return WORDS[kind].format(**bounds) if kind in WORDS else str(error["msg"]).removeprefix("Value error, ")
