"""ASGI middleware that limits requests per address and counts responses."""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import Refused
from server.core.metrics import OTHER, Metrics
from server.gateway.responses import refusal_response
from server.gateway.sockets import Sockets
from server.gateway.websocket import EXTENSION
from server.limits.per_address import Addresses

PROBES = frozenset({"/healthz", "/readyz"})
"""Paths of load balancers' probes, which may share an address with all clients. They are delayed and never refused."""


class Counted:
    """ASGI middleware that limits requests and handshakes per address. Beyond the rate, responses are delayed, and all
    except those to probes are refusals.
    """

    def __init__(self, app: ASGIApp, addresses: Addresses, sockets: Sockets) -> None:
        self._app = app
        self._addresses = addresses
        self._sockets = sockets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request. Refuse it if its address exceeds the rate."""
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
        """Wait for the turn of a delayed response. Return False if the client disconnects. Meanwhile the connection
        counts as idle.
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
    """ASGI middleware that counts responses by path and status. Paths with ids and unknown paths are `other`.

    A response to a client that is gone is neither sent nor counted, because `Http` may have responded.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and count its response."""
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
    """ASGI middleware around `CORSMiddleware`. It counts the preflights that `CORSMiddleware` answers, and leaves other
    requests to `Counted`.
    """

    def _is_counted(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return False
        return {"origin", "access-control-request-method"}.issubset(HTTPConnection(scope).headers.keys())
