"""Errors in the shape of OpenAI's API, with the statuses that its clients act on."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flabc.errors import CancelledError, ClosedError, DeadlineError, FlabcError, QueueFullError, UsageError

#: Seconds after which to ask again a server that is shutting down: another one will have its place.
RESTART_S = 10

#: What OpenAI calls a status; others are ``invalid_request_error`` or ``server_error``.
TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}


class ModelNotFoundError(FlabcError):
    """A request names a model that is not served here."""


class PromptError(FlabcError):
    """A prompt that the model cannot take."""


@dataclass(frozen=True)
class Kind:
    """The status of an error, and its ``code``."""

    status: int
    code: str | None = None


#: What becomes of errors, most special first; of all others the server is at fault.
KINDS: dict[type[FlabcError], Kind] = {
    QueueFullError: Kind(429, "queue_full"),
    ClosedError: Kind(503, "shutting_down"),
    DeadlineError: Kind(504, "timeout"),
    CancelledError: Kind(499, "cancelled"),  # nobody reads it
    ModelNotFoundError: Kind(404, "model_not_found"),
    PromptError: Kind(400, "prompt"),
    UsageError: Kind(400),
}


def body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of(error: FlabcError) -> tuple[int, dict[str, Any]]:
    """Status and object of an error of ours."""
    kind = next((kind for cls, kind in KINDS.items() if isinstance(error, cls)), Kind(500))
    return kind.status, body(str(error), kind.status, kind.code)


def response(error: FlabcError) -> JSONResponse:
    """The reply that tells an error of ours."""
    status, content = of(error)
    seconds = error.retry_after_s if isinstance(error, QueueFullError) else RESTART_S
    return JSONResponse(content, status, {"Retry-After": str(seconds)} if status in (429, 503) else None)


def invalid(error: RequestValidationError) -> JSONResponse:
    """The reply to a body that does not validate: 400, as OpenAI has it. Nothing of the body is repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return JSONResponse(body(message, 400, param=place), 400)


def http(error: HTTPException) -> JSONResponse:
    """The reply to what has no route, or too large a body."""
    message = str(error.detail) or HTTPStatus(error.status_code).phrase
    return JSONResponse(body(message, error.status_code), error.status_code, error.headers)
