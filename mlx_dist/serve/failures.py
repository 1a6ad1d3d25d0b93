"""What goes wrong, in OpenAI's shape: status, `{"error": {...}}`, headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from mlx_dist.errors import (
    MlxDistError,
    NotReadyError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)

STATUSES = {
    400: "a field is unknown, not supported or out of range, or the body is no JSON",
    401: "the API key is missing or wrong",
    403: "the Host or Origin header is not one that is served",
    404: "no such route or model",
    405: "the route has another method",
    408: "the request itself took too long to arrive",
    413: "the body or the prompt is too large",
    415: "the body is not JSON in UTF-8 by its content type",
    429: "the queue is full; Retry-After says when to come again",
    431: "the headers are too large",
    500: "a fault of the server's own; its log has it",
    503: "not ready, draining, or shutting down; Retry-After as above",
    504: "the answer took longer than the request time; clients are told not to retry",
}
_RETRY_AFTER_S = 2
_MOST_PARAM_LENGTH = 100
# What pydantic calls a field that is not declared, and one that only takes null.
_CODES = {"extra_forbidden": "unknown_parameter", "none_required": "unsupported_parameter"}


class ApiError(HTTPException):
    """An answer that is an error. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message)
        self.headers: dict[str, str] = dict(headers or {})
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> bytes:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def response(self) -> Response:
        return Response(self.body, self.status_code, self.headers, "application/json")


def not_ready(message: str) -> ApiError:
    """503, and when to come again."""
    return ApiError(503, message, code="not_ready", headers={"retry-after": str(_RETRY_AFTER_S)})


def ending() -> ApiError:
    """503 from a process that is about to end, not in order: others may answer soon."""
    message = "the server is ending: a rank failed, or it was told to; nothing more comes from it"
    return ApiError(503, message, code="ending", headers={"retry-after": str(_RETRY_AFTER_S)})


def timed_out(timeout_s: float) -> ApiError:
    """504. A client that tries again would only ask for the same long work once more."""
    message = f"the answer took longer than {timeout_s:g} s; ask for fewer tokens"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def as_api_error(error: MlxDistError) -> ApiError:
    """The answer to what the engine refused."""
    match error:
        case PromptTooLongError():
            return ApiError(413, str(error), code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), code="invalid_value")
        case QueueFullError():
            headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case NotReadyError():
            return not_ready(str(error))
        case _:
            return ApiError(500, str(error), code="internal_error")


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Name `param` as what is wrong if the engine's code refuses a value in here."""
    try:
        yield
    except RequestError as error:
        failure = as_api_error(error)
        raise ApiError(
            failure.status_code, f"{param}: {error}", param=param, code=failure.code
        ) from None


def add_handlers(app: FastAPI) -> None:
    """Answer every exception that leaves a route in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _(_request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(MlxDistError)
    async def _(_request: Request, error: MlxDistError) -> Response:
        return as_api_error(error).response

    @app.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors()[0]).response

    @app.exception_handler(StarletteHTTPException)
    async def _(request: Request, error: StarletteHTTPException) -> Response:
        message = f"{request.method} {request.url.path[:_MOST_PARAM_LENGTH]}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response

    @app.exception_handler(Exception)
    async def _(_request: Request, _error: Exception) -> Response:
        # The server closes the connection after an error that it does not know.
        headers = {"connection": "close"}
        message = "internal error; the server's log has it"
        return ApiError(500, message, code="internal_error", headers=headers).response


def _invalid(error: dict[str, Any]) -> ApiError:
    """The answer to what pydantic found."""
    param = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:]
    ).lstrip(".")[:_MOST_PARAM_LENGTH]
    match error["type"]:
        case "extra_forbidden":
            reason = "is not a field that is known here"
        case "none_required":
            reason = "is not supported; leave it out"
        case "missing":
            reason = "is missing"
        case "value_error":
            reason = str(error["ctx"]["error"])
        case _:
            reason = error["msg"][0].lower() + error["msg"][1:]
    code = _CODES.get(error["type"], "invalid_value")
    return ApiError(400, f"{param or 'the body'}: {reason}", param=param or None, code=code)
