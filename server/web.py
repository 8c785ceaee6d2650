"""What all HTTP endpoints share: refusals become answers, bodies have a limit, values become JSON."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_FRAME_BYTES
from protocol.server import Error
from server.addresses import Addresses
from server.dispatch import error_frame
from server.errors import INTERNAL, log_defect, refusal
from server.metrics import OTHER, Metrics
from server.sockets import Sockets
from server.websocket import EXTENSION

log = logging.getLogger(__name__)

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
"""The HTTP status of each refusal."""

PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that a load balancer asks, from an address that it may share with all clients: late answers, but no refusals.
"""

NO_PATH = Refused(ErrorCode.NOT_FOUND, "This path does not exist. Use a path from `/v1/openapi.json`.")

Endpoint = Callable[[Request], Awaitable[Response]]


def endpoint(inner: Endpoint) -> Endpoint:
    """Return `inner` with everything that goes wrong in it told to the client as on the socket."""

    async def outer(request: Request) -> Response:
        try:
            return await inner(request)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is answered
            refused = refusal(error)
            if refused is None:
                log_defect(log, request.url.path, error)
                refused = INTERNAL
            return refusal_response(refused)

    return outer


class Counted:
    """ASGI middleware: every request and handshake takes from the allowance of its address. Beyond it, answers come
    late, and all but those to probes are refusals.
    """

    def __init__(self, app: ASGIApp, addresses: Addresses, sockets: Sockets) -> None:
        self._app = app
        self._addresses = addresses
        self._sockets = sockets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it if its address has sent too many."""
        if self._is_counted(scope):
            request = HTTPConnection(scope)
            try:
                self._addresses.require(request)
            except Refused as refused:
                if not await self._waited(request, receive):
                    return
                if scope.get("method") not in {"GET", "HEAD"} or scope["path"] not in PROBES:
                    await refusal_response(refused)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _waited(self, request: HTTPConnection, receive: Receive) -> bool:
        """Wait until it is the turn of a late answer; False if the client has gone. Meanwhile its connection makes room
        for others.
        """
        connection = request.scope["extensions"][EXTENSION]
        if not connection.transport.is_closing():
            self._sockets.waits(connection, connection.transport.abort)
        with self._addresses.late(request) as seconds:
            try:
                async with asyncio.timeout(seconds):
                    while not (await receive())["type"].endswith("disconnect"):
                        pass
            except TimeoutError:
                self._sockets.works(connection)
                return True
        return False

    def _is_counted(self, scope: Scope) -> bool:
        return scope["type"] in {"http", "websocket"}


class Tallied:
    """ASGI middleware: counts answers by path and status. Paths that are no route's or hold ids are `other`.

    An answer to a client that is gone is not sent, and not counted: `Http` may have answered it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and count its answer."""
        path = scope.get("path", "")
        is_gone = False

        async def receiving() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "http.disconnect"
            return message

        async def counting(message: Message) -> None:
            if not is_gone and message["type"] in {"http.response.start", "websocket.http.response.start"}:
                self._metrics.answers[path if path in self._paths else OTHER, message["status"]] += 1
            await send(message)

        await self._app(scope, receiving, counting)


class CountedPreflights(Counted):
    """ASGI middleware around `CORSMiddleware`: counts what that answers itself, and leaves the rest to `Counted`."""

    def _is_counted(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return False
        return {"origin", "access-control-request-method"}.issubset(HTTPConnection(scope).headers.keys())


async def no_route(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's shape
    """Return the answer to a request whose path or method is not there."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = Headers(error.headers).get("allow", "")
        refused = Refused(ErrorCode.INVALID, f"This path is for other methods. Use {allowed}.")
        response = refusal_response(refused, status=error.status_code)
        response.headers["allow"] = allowed
        return response
    return refusal_response(NO_PATH)


async def no_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request or a WebSocket handshake whose path is not there, as `no_route` does."""
    await refusal_response(NO_PATH)(scope, receive, send)


def refusal_response(refused: Refused, *, status: int | None = None) -> Response:
    """Return the answer to a request that was refused."""
    return error_response(error_frame(refused), status=status)


def error_response(error: Error, *, status: int | None = None) -> Response:
    """Return an error as the answer to a request, with its time to come back in the header that HTTP clients know."""
    response = json_response(error, status=status or STATUS[error.code])
    if error.retry_after_ms is not None:
        response.headers["retry-after"] = str(-(-error.retry_after_ms // 1000))
    return response


def json_response(value: object, *, status: int = 200) -> Response:
    """Return `value` as JSON, not to be kept by anyone in between."""
    return Response(encode(value), status, {"cache-control": "no-store"}, JSON)


async def limited_body(request: Request) -> bytes:
    """Return the body of a request. Raises Refused if it is larger than a frame may be."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FRAME_BYTES:
                raise Refused(ErrorCode.INVALID, f"A request's body has at most {MAX_FRAME_BYTES} bytes.")
    except ClientDisconnect:
        raise Refused(ErrorCode.BAD_FRAME, "The body is shorter than its `Content-Length`. Send all of it.") from None
    return bytes(body)
