"""When to ask again, and how long to wait before: exponential back-off with jitter, never sooner than Retry-After says."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

RETRIED = (429, 502, 503)
"""Too many requests, and a server (or a proxy before it) that cannot take one now. All calls may be repeated safely."""
NO_ROUTES = b"/-/routes for available routes"
"""What Ray's proxies say with their 404 while they begin and know of no application yet. The endpoint's own 404 is a problem document."""


class ApiError(Exception):
    """The server refused: `reason` is for programs (docs/reference/http-api.md lists them), the message says what to do."""

    def __init__(
        self, status: int, reason: str, detail: str, request_id: str | None = None, errors: Any = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.request_id = request_id
        self.errors = errors

    @classmethod
    def of(cls, data: Any, status: int = 0) -> ApiError:
        """From a problem document; from anything else, what the status alone tells."""
        if not isinstance(data, dict) or "detail" not in data:
            data = {"detail": f"The server answered {status}, without saying why."}
        status = data.get("status", status)
        return cls(
            status, data.get("reason", "unknown"), str(data["detail"]), data.get("request_id"), data.get("errors")
        )


@dataclass(frozen=True)
class Retry:
    """attempts: in all, the first included. Waits lie between half and all of first_wait * 2^n seconds, up to max_wait."""

    attempts: int = 6
    first_wait: float = 0.25
    max_wait: float = 20.0

    def wait(self, attempt: int, outcome: httpx.Response | httpx.TransportError, deadline: float) -> float | None:
        """Seconds to wait after attempt 1, 2, ... before the next; None: give up. `deadline`: as of time.monotonic()."""
        if isinstance(outcome, httpx.Response):
            begins = outcome.status_code == 404 and NO_ROUTES in outcome.content
            if outcome.status_code not in RETRIED and not begins:
                return None
            least = retry_after(outcome)
        elif isinstance(outcome, httpx.UnsupportedProtocol):
            return None
        else:
            least = 0.0
        if attempt >= self.attempts:
            return None
        backoff = min(self.max_wait, self.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        seconds = max(backoff, least)
        return seconds if time.monotonic() + seconds < deadline else None


def retry_after(response: httpx.Response) -> float:
    """Seconds of the header, a number or a date (RFC 9110, 10.2.3); 0 without one."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
