"""The HTTP endpoints other than accounts: the WebSocket, single frames, health, metrics, and the documents."""

import asyncio
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket as Handshake
from starlette.websockets import WebSocketDisconnect

from protocol import SUBPROTOCOL
from protocol.client import Authenticate
from protocol.codec import decode_client, encode
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import UserId
from protocol.server import Error
from server.auth.sessions import Sessions
from server.auth.tickets import TicketRefused
from server.context import Context, Services
from server.core.addresses import parsed
from server.core.errors import refusal
from server.core.metrics import Metrics
from server.core.proxies import Network, is_within
from server.db.readiness import Readiness
from server.fairness.turns import Turns
from server.gateway.compression import gzip, gzipped
from server.gateway.connection import NOT_TEXT, Connection, ConnectionDeps
from server.gateway.dispatch import error_frame
from server.gateway.responses import JSON, error_response, json_response, refusal_response
from server.gateway.websocket import EXTENSION, WebSocket
from server.http import asyncapi, openapi
from server.http.accounts import Accounts
from server.http.credentials import token_of
from server.http.routing import endpoint
from server.limits.admission import Admission, Slot
from server.limits.per_address import Addresses, host_of, key_of
from server.limits.token_bucket import TokenBuckets
from server.queries.sessions import Active

FORWARDING = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"})
"""Headers that proxies add. A request with one comes from elsewhere, whatever the address of the peer."""
LOCAL = re.compile(r"(^|\.)localhost\Z")
"""Names that browsers resolve to this machine themselves (RFC 6761)."""
AUTHENTICATE_SECONDS = 5.0
"""Max wait for `authenticate`, in seconds."""
READY_SECONDS = 2.0
"""Max time of the database's check for `/readyz`, in seconds."""
CALL_SECONDS = 10.0
"""Max wait of a call for others of its user at this worker, in seconds."""
NO_SOCKET = Refused(
    ErrorCode.INVALID, "This path needs a WebSocket. Connect by WebSocket, or send single frames to `POST /v1/call`."
)
OTHER_PROTOCOL = Refused(
    ErrorCode.INVALID,
    f"`Sec-WebSocket-Protocol` must offer `{SUBPROTOCOL}`, or be left out.",
    path="sec-websocket-protocol",
)
CONNECTS_PER_SECOND = 10.0
"""Max new connections, per user, second and worker. The burst is twice the max of open connections. A new connection
costs as much as ten small frames, and more with each conversation.
"""


@cache
def _encoded(document: Callable[[], object]) -> bytes:
    """Return a document, encoded once, because generating it takes fifty milliseconds."""
    return encode(document())


@cache
def _compressed(document: Callable[[], object]) -> bytes:
    """Return a document compressed, also once, because strangers may request it as often as they like."""
    return gzip(_encoded(document))


class TooLate(Refused):
    """The refusal for a client that does not authenticate in time. Its token may be valid."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.UNAUTHENTICATED,
            "The handshake had no `Authorization: Bearer` and no session cookie. Connect again with one of them, or "
            "send `authenticate` within five seconds.",
        )


def _close_code(refused: Refused) -> CloseCode:
    """Return the close code for a refused connection. A valid token is never reported as an invalid one."""
    if refused.code in {ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED, ErrorCode.INTERNAL}:
        return CloseCode.GOING_AWAY
    return CloseCode.WITH_TOKEN if isinstance(refused, (TicketRefused, TooLate)) else CloseCode.UNAUTHENTICATED


class HttpDeps(NamedTuple):
    """Dependencies of the endpoints."""

    services: Services
    connection_deps: ConnectionDeps
    sessions: Sessions
    accounts: Accounts
    origins: frozenset[str]
    metrics: Metrics
    metrics_from: tuple[Network, ...]
    metrics_names: frozenset[str]
    is_draining: asyncio.Event
    addresses: Addresses
    connects: TokenBuckets[UserId]
    admission: Admission
    compresses: bool


class Endpoints:
    """All endpoints except those under /v1/auth."""

    def __init__(self, deps: HttpDeps) -> None:
        self._deps = deps
        # The same limit as for frames from sockets, because each connection has one frame in progress.
        self._calls: Turns[UserId] = Turns(deps.connection_deps.connections_per_user, patience=CALL_SECONDS)
        self._readiness = Readiness(self._has_database)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            WebSocketRoute("/v1/ws", self.socket),
            Route("/v1/ws", self.no_socket, methods=["GET"]),
            Route("/v1/call", endpoint(self.call), methods=["POST"]),
            Route("/healthz", self.alive, methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/asyncapi.json", self.asyncapi, methods=["GET"]),
            Route("/v1/openapi.json", self.openapi, methods=["GET"]),
        ]

    async def socket(self, handshake: Handshake) -> None:
        """Authenticate a WebSocket, and pass it to a connection."""
        try:
            disconnect = self._deps.addresses.connect(handshake)
        except Refused as refused:
            await handshake.send_denial_response(refusal_response(refused))
            return
        connection: Connection | None = None
        try:
            connection = await self._let_in(handshake, disconnect)
        finally:
            if connection is None:
                disconnect()

    async def _let_in(self, handshake: Handshake, disconnect: Callable[[], None]) -> Connection | None:
        admitted: tuple[Active, Slot] | None = None
        if (offered := handshake.scope["subprotocols"]) and SUBPROTOCOL not in offered:
            # RFC 6455, section 4.2.2, leaves this to the server. A client of another version would misread the frames.
            await handshake.send_denial_response(refusal_response(OTHER_PROTOCOL, status=400))
            return None
        try:
            if self._deps.is_draining.is_set():
                raise Refused(
                    ErrorCode.UNAVAILABLE,
                    "The server is shutting down. Reconnect after `retry_after_ms`.",
                    retry_after_ms=1_000,
                )
            # With a token in the handshake, a refusal is an HTTP response that any client can read.
            if (token := token_of(handshake, self._deps.origins)) is not None:
                admitted = await self._admit(token, key_of(handshake))
        except Exception as error:
            refused = refusal(error, "a handshake")
            if refused is None:
                raise
            await handshake.send_denial_response(refusal_response(refused))
            return None
        try:
            await handshake.accept(subprotocol=SUBPROTOCOL if handshake.scope["subprotocols"] else None)
        except BaseException:
            if admitted is not None:
                admitted[1].end()
            raise
        if admitted is None and (admitted := await self._introduced(handshake)) is None:
            return None
        active, slot = admitted
        socket: WebSocket = handshake.scope["extensions"][EXTENSION]
        if self._deps.is_draining.is_set():
            # The worker began to drain during the handshake. `drain` has already collected its connections.
            slot.end()
            socket.close(CloseCode.GOING_AWAY)
            return None
        connection = Connection(
            socket,
            self._deps.connection_deps,
            expires_at=active.expires_at,
            user_version=active.user_version,
            slot=slot,
            gone=disconnect,
        )
        context = Context(
            services=self._deps.services, user=active.user, session_id=active.session_id, subscriber=connection
        )
        connection.begin(context, is_resuming=handshake.query_params.get("resume") == "1")
        return connection

    async def no_socket(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's shape
        """Tell a plain HTTP client that this path is for WebSockets."""
        response = refusal_response(NO_SOCKET, status=426)
        response.headers["upgrade"] = "websocket"
        return response

    async def call(self, request: Request) -> Response:
        """Run one frame."""
        active, data = await self._deps.accounts.session_and_body(request)
        context = Context(services=self._deps.services, user=active.user, session_id=active.session_id)
        dispatch = self._deps.connection_deps.dispatch
        await self._calls.take(context.user_id)
        try:
            answer = await dispatch.run(context, data)
        finally:
            self._calls.give(context.user_id)
        response = error_response(answer) if isinstance(answer, Error) else json_response(answer)
        dispatch.answered(context.user_id, data, len(response.body))
        # Pages of other sites cannot send a session with this method, so they cannot observe compressed sizes.
        return gzipped(response, request) if self._deps.compresses else response

    async def alive(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's shape
        """Respond that the process is alive."""
        return PlainTextResponse("alive\n")

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """Report whether clients should be sent to this server, with the result of each check."""
        checks = {
            "database": await self._readiness.is_given(),
            "bus": self._deps.connection_deps.hub.bus.is_up,
            "accepting": not self._deps.is_draining.is_set(),
        }
        return json_response(checks, status=200 if all(checks.values()) else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of all workers. For clients that may not read them, the path does not exist."""
        address = parsed(request.client.host) if request.client else None
        is_direct = FORWARDING.isdisjoint(request.headers.keys()) and "origin" not in request.headers
        if address is None or not is_direct or not is_within(address, self._deps.metrics_from):
            raise HTTPException(404)
        # DNS rebinding can make a page's name resolve to this server, and a browser may run on this machine.
        host = host_of(request)
        if host is None or not (host in self._deps.metrics_names or LOCAL.search(host) or parsed(host)):
            raise HTTPException(404)
        return Response(self._deps.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def asyncapi(self, request: Request) -> Response:
        """Return the AsyncAPI document."""
        return self._document(asyncapi.document, request)

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        return self._document(openapi.document, request)

    def _document(self, document: Callable[[], object], request: Request) -> Response:
        response = Response(_encoded(document), media_type=JSON)
        return gzipped(response, request, _compressed(document)) if self._deps.compresses else response

    async def _has_database(self) -> bool:
        try:
            return await asyncio.wait_for(self._deps.services.database.is_ready(), READY_SECONDS)
        except Exception as error:
            if refusal(error, "/readyz") is None:
                raise
            return False

    async def _admit(self, token: str, address: str) -> tuple[Active, Slot]:
        """Return the session of a token and the connection's slot in admission. The slot is taken only now, so that
        silent connections do not hold slots.
        """
        slot = self._deps.admission.begin(address)

        def require(user_id: UserId) -> None:
            self._deps.connects.require(user_id)
            slot.require(user_id)

        try:
            return await self._deps.sessions.admit(token, require), slot
        except BaseException:
            slot.end()
            raise

    async def _introduced(self, handshake: Handshake) -> tuple[Active, Slot] | None:
        """Return the session that the first frame names. Without one, send an error, close, and return None."""
        try:
            return await self._admit((await self._first_frame(handshake)).token, key_of(handshake))
        except WebSocketDisconnect:
            return None
        except Exception as error:
            refused = refusal(error, "authenticate")
            if refused is None:
                raise
            await handshake.send_text(encode(error_frame(refused)).decode())
            socket: WebSocket = handshake.scope["extensions"][EXTENSION]
            socket.close(_close_code(refused))
            return None

    async def _first_frame(self, handshake: Handshake) -> Authenticate:
        try:
            message = await asyncio.wait_for(handshake.receive(), AUTHENTICATE_SECONDS)
        except TimeoutError:
            raise TooLate from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        socket: WebSocket = handshake.scope["extensions"][EXTENSION]
        if not socket.is_first_text:
            raise NOT_TEXT
        frame = decode_client(message.get("bytes") or b"")
        if not isinstance(frame, Authenticate):
            raise Refused(ErrorCode.UNAUTHENTICATED, "The first frame must be `authenticate`.", path="type")
        return frame
