"""Errors of the service: every one has the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from codebook.errors import CodebookError, printable, quoted

CLIENT_LEFT = 499
"""Status, as nginx has it, of a request whose client left before the answer."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Types of errors by status, beside `invalid_request_error` below 500 and `server_error` above."""


class ServiceError(CodebookError):
    """A request that is refused.

    Parameters
    ----------
    status
        HTTP status.
    message
        What is wrong and what to do about it.
    code
        A short name for programs, such as `model_not_found`.
    param
        The field of the request that is at fault.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def too_late() -> ServiceError:
    """The error of a request that took too long."""
    return ServiceError(503, "no answer within the time limit: ask for fewer tokens, or try again later", "timeout")


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape: `{"error": {message, type, param, code}}`."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": printable(message), "type": kind, "param": param, "code": code}}
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", "1")
    return JSONResponse(body, status_code=status, headers=headers)


def response_to(error: BaseException) -> JSONResponse:
    """The response to an error that was raised."""
    if isinstance(error, ServiceError):
        return error_response(error.status, str(error), error.code, error.param)
    if isinstance(error, CodebookError):
        return error_response(422, str(error))
    return error_response(500, f"unexpected {type(error).__name__}: please report it with the server's log")


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of an app the one shape, also those of the framework and those that nobody expected."""

    @app.exception_handler(CodebookError)
    async def refused(_: Request, error: CodebookError) -> JSONResponse:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(422, *first_fault(error.errors()))

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> JSONResponse:
        taken = (error.headers or {}).get("Allow")
        remedy = "see docs/serving.md for those there are" if taken is None else f"ask by {taken}"
        message = f"{error.detail}: {request.method} {quoted(request.url.path)}; {remedy}"
        return error_response(error.status_code, message, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return response_to(error)


def first_fault(faults: Any) -> tuple[str, None, str | None]:
    """(message, None, place) of the first fault that pydantic found; nothing of the input is repeated."""
    fault, place = faults[0], ".".join(str(part) for part in faults[0]["loc"])
    what = "is not understood here: leave it out" if fault["type"] == "extra_forbidden" else fault["msg"]
    return f"{place or 'the body'}: {what.removeprefix('Value error, ')}", None, place[:200] or None
