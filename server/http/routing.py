"""Error responses and limits of bodies for all HTTP endpoints."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_FRAME_BYTES
from server.core.errors import INTERNAL, log_defect, refusal
from server.gateway.responses import refusal_response

log = logging.getLogger(__name__)

NO_PATH = Refused(ErrorCode.NOT_FOUND, "This path does not exist. Use a path from `/v1/openapi.json`.")

Endpoint = Callable[[Request], Awaitable[Response]]


def endpoint(inner: Endpoint) -> Endpoint:
    """Return `inner` with an error response for everything that it raises, with the same errors as on the socket."""

    async def outer(request: Request) -> Response:
        try:
            return await inner(request)
        except Exception as error:  # noqa: BLE001 - any error becomes a response
            what = _path(request)
            refused = refusal(error, what)
            if refused is None:
                log_defect(log, what, error)
                refused = INTERNAL
            return refusal_response(refused)

    return outer


def _path(request: Request) -> str:
    """Return the path of a request for the log, with the names of parameters instead of their values."""
    path = request.url.path
    for name, value in request.path_params.items():
        path = path.replace(str(value), f"{{{name}}}")
    return path


async def no_route(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's shape
    """Return the response to a request whose path or method does not exist."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for this class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = Headers(error.headers).get("allow", "")
        refused = Refused(ErrorCode.INVALID, f"This path does not support the method. Use {allowed}.")
        response = refusal_response(refused, status=error.status_code)
        response.headers["allow"] = allowed
        return response
    return refusal_response(NO_PATH)


async def no_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a request or a WebSocket handshake whose path does not exist, as `no_route` does."""
    await refusal_response(NO_PATH)(scope, receive, send)


async def limited_body(request: Request) -> bytes:
    """Return the body of a request. Raises Refused if it is longer than a frame may be."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FRAME_BYTES:
                raise Refused(ErrorCode.INVALID, f"The body is longer than {MAX_FRAME_BYTES} bytes. Shorten it.")
    except ClientDisconnect:
        raise Refused(ErrorCode.BAD_FRAME, "The body is shorter than its `Content-Length`. Send all of it.") from None
    return bytes(body)
