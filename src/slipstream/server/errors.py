"""Refusals in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}

_TEXT = {"type": ["string", "null"]}
_FIELDS: dict[str, Any] = {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT}
_INNER = {"type": "object", "properties": _FIELDS, "required": list(_FIELDS)}
ERROR = {"type": "object", "properties": {"error": _INNER}, "required": ["error"]}  # for the document


class ApiError(HTTPException):
    """What a client gets instead of an answer. param: the field at fault. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": str(self.detail), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


@contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """What the rooms below say about a bad request (``ValueError``, ``TypeError``) is the client's to hear."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise ApiError(400, str(error), param=param) from error


async def on_http_error(http: HttpRequest, error: Exception) -> JSONResponse:
    """For refusals of ours and those of the framework (no such route, no such method)."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    message = f"{error.detail}: {http.method} {http.url.path}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def on_invalid(_: HttpRequest, error: Exception) -> JSONResponse:
    """For bodies that are not JSON, or whose fields have the wrong type: the first of the mistakes."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {where}").response()
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json").response()
    return ApiError(400, f"{where}: {first['msg']}", param=where).response()
