"""HTTP responses: values and refusals as JSON."""

from starlette.responses import Response

from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.server import Error
from server.gateway.dispatch import error_frame

JSON = "application/json"
STATUS = {
    ErrorCode.BAD_FRAME: 400,
    ErrorCode.INVALID: 422,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.CONFLICT: 409,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.INTERNAL: 500,
}
"""The HTTP status of each error code."""


def refusal_response(refused: Refused, *, status: int | None = None) -> Response:
    """Return the response to a refused request."""
    return error_response(error_frame(refused), status=status)


def error_response(error: Error, *, status: int | None = None) -> Response:
    """Return an error as a response. `Retry-After` has its retry time."""
    response = json_response(error, status=status or STATUS[error.code])
    if error.retry_after_ms is not None:
        response.headers["retry-after"] = str(-(-error.retry_after_ms // 1000))
    return response


def json_response(value: object, *, status: int = 200) -> Response:
    """Return `value` as JSON, which no cache may store."""
    return Response(encode(value), status, {"cache-control": "no-store"}, JSON)
