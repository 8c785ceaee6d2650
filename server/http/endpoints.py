"""The HTTP endpoints that are not about accounts: the socket's door, one frame by HTTP, health, documents."""

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
"""Headers that proxies add: what comes through one comes from elsewhere, whatever the peer's address is."""
LOCAL = re.compile(r"(^|\.)localhost\Z")
"""Names that browsers themselves take for this machine (RFC 6761)."""
AUTHENTICATE_SECONDS = 5.0
READY_SECONDS = 2.0
CALL_SECONDS = 10.0
"""Max time that a call waits for others of the same user at the worker, in seconds."""
NO_SOCKET = Refused(
    ErrorCode.INVALID, "This path needs a WebSocket. Connect by WebSocket, or send single frames to `POST /v1/call`."
)
OTHER_PROTOCOL = Refused(
    ErrorCode.INVALID,
    f"`Sec-WebSocket-Protocol` must offer `{SUBPROTOCOL}`, or be left out.",
    path="sec-websocket-protocol",
)
CONNECTS_PER_SECOND = 10.0
"""Max connections of one user that begin, per second and worker; twice as many as may be open begin immediately. One
that begins costs as much as ten small frames, and more with each conversation.
"""


@cache
def _encoded(document: Callable[[], object]) -> bytes:
    """Return a description, encoded once: making one takes fifty milliseconds."""
    return encode(document())


class TooLate(Refused):
    """The answer to a client that does not authenticate. Its token may be good."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.UNAUTHENTICATED,
            "The handshake had no `Authorization: Bearer` and no session cookie. Connect again with one of them, or "
            "send `authenticate` within five seconds.",
        )


def _close_code(refused: Refused) -> CloseCode:
    """Return what to close a connection with that is not let in: a good token is never called a bad one."""
    if refused.code in {ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED, ErrorCode.INTERNAL}:
        return CloseCode.GOING_AWAY
    return CloseCode.WITH_TOKEN if isinstance(refused, (TicketRefused, TooLate)) else CloseCode.UNAUTHENTICATED


class HttpDeps(NamedTuple):
    """What it takes to let somebody in."""

    services: Services
    shared: ConnectionDeps
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


class Endpoints:
    """Everything but /v1/auth."""

    def __init__(self, door: HttpDeps) -> None:
        self._door = door
        # The same bound as that of frames by the socket, of which each connection answers one at a time.
        self._calls: Turns[UserId] = Turns(door.shared.connections_per_user, patience=CALL_SECONDS)
        self._database = Readiness(self._has_database)

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
        """Authenticate a WebSocket and hand it over to a connection."""
        try:
            disconnect = self._door.addresses.connect(handshake)
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
            # RFC 6455, section 4.2.2, leaves it to the server. A client of another version would misread ours.
            await handshake.send_denial_response(refusal_response(OTHER_PROTOCOL, status=400))
            return None
        try:
            if self._door.is_draining.is_set():
                raise Refused(
                    ErrorCode.UNAVAILABLE,
                    "The server is shutting down. Reconnect after `retry_after_ms`.",
                    retry_after_ms=1_000,
                )
            # With a token, a refusal is still an HTTP answer that any client can read.
            if (token := token_of(handshake, self._door.origins)) is not None:
                admitted = await self._admit(token, key_of(handshake))
        except Exception as error:
            refused = refusal(error)
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
        active, place = admitted
        socket: WebSocket = handshake.scope["extensions"][EXTENSION]
        if self._door.is_draining.is_set():
            # Since it was asked above. Those who are sent away are no longer counted.
            place.end()
            socket.close(CloseCode.GOING_AWAY)
            return None
        connection = Connection(
            socket,
            self._door.shared,
            expires_at=active.expires_at,
            user_version=active.user_version,
            place=place,
            gone=disconnect,
        )
        context = Context(
            services=self._door.services, user=active.user, session_id=active.session_id, subscriber=connection
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
        active, data = await self._door.accounts.asked(request)
        context = Context(services=self._door.services, user=active.user, session_id=active.session_id)
        dispatch = self._door.shared.dispatch
        await self._calls.take(context.user_id)
        try:
            answer = await dispatch.run(context, data)
        finally:
            self._calls.give(context.user_id)
        response = error_response(answer) if isinstance(answer, Error) else json_response(answer)
        dispatch.answered(context.user_id, data, len(response.body))
        return response

    async def alive(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's shape
        """Say that the process answers."""
        return PlainTextResponse("alive\n")

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """Say whether clients should be sent here, and if not, why not."""
        checks = {
            "database": await self._database.is_given(),
            "bus": self._door.shared.hub.bus.is_up,
            "accepting": not self._door.is_draining.is_set(),
        }
        return json_response(checks, status=200 if all(checks.values()) else 503)

    async def metrics(self, request: Request) -> Response:
        """Return all workers' numbers, to those who may read them: for others the path is not there."""
        address = parsed(request.client.host) if request.client else None
        is_direct = FORWARDING.isdisjoint(request.headers.keys()) and "origin" not in request.headers
        if address is None or not is_direct or not is_within(address, self._door.metrics_from):
            raise HTTPException(404)
        # A page's name may be made to lead here (DNS rebinding), and its browser may run on this machine.
        host = host_of(request)
        if host is None or not (host in self._door.metrics_names or LOCAL.search(host) or parsed(host)):
            raise HTTPException(404)
        return Response(self._door.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def asyncapi(self, request: Request) -> Response:  # noqa: ARG002
        """Return the description of the socket."""
        return Response(_encoded(asyncapi.document), media_type=JSON)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        """Return the description of the HTTP endpoints."""
        return Response(_encoded(openapi.document), media_type=JSON)

    async def _has_database(self) -> bool:
        try:
            return await asyncio.wait_for(self._door.services.database.is_current(), READY_SECONDS)
        except Exception as error:
            if refusal(error) is None:
                raise
            return False

    async def _admit(self, token: str, address: str) -> tuple[Active, Slot]:
        """Return the session of a token, and the place of its connection among those that are on their way in: only
        now, or whoever connects and says nothing would keep others out.
        """
        place = self._door.admission.begin(address)

        def require(user_id: UserId) -> None:
            self._door.connects.require(user_id)
            place.require(user_id)

        try:
            return await self._door.sessions.admit(token, require), place
        except BaseException:
            place.end()
            raise

    async def _introduced(self, handshake: Handshake) -> tuple[Active, Slot] | None:
        """Return the session that the first frame names; if none, tell the client, close, and return None."""
        try:
            return await self._admit((await self._first_frame(handshake)).token, key_of(handshake))
        except WebSocketDisconnect:
            return None
        except Exception as error:
            refused = refusal(error)
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
