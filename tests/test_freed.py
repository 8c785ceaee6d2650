"""Closed connections are freed immediately. In a reference cycle they would wait for the garbage collector, and a
worker with many short connections would grow.
"""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest
from httptools import HttpRequestParser
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from websockets.exceptions import InvalidStatus
from websockets.server import ServerProtocol

from protocol.client import Ping
from protocol.errors import CloseCode
from prove.client import Client
from server.context import Context
from server.gateway.connection import Connection
from server.gateway.http_protocol import Http
from server.gateway.websocket import WebSocket
from tests.world import UserSession, World, http_client, until

KINDS = {Connection, Context, WebSocket, Http, ServerProtocol, RequestResponseCycle, HttpRequestParser}
"""Types of which each connection of the server has an object."""
PING, WRONG = b'{"type": "ping"}', "wrong"


def alive() -> Counter[str]:
    """Return the number of objects of connections, by type."""
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in KINDS)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Ways:
    """The ways in which a connection ends."""

    def __init__(self, world: World, who: UserSession) -> None:
        self._world = world
        self._who = who

    def all(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return them, by name."""
        token, bearer = self._who.token, f"Authorization: Bearer {self._who.token}\r\n".encode()
        upgrade = b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        call = b"POST /v1/call HTTP/1.1\r\nHost: x\r\n" + bearer
        return {
            "the client closes": lambda: self._socket(Client.close),
            "the client disappears": lambda: self._socket(Client.drop),
            "the client disappears within a message": lambda: self._socket(
                Client.drop, b"\x81\xfe\x40\x00\x00\x00\x00\x00x"
            ),
            "the server closes": lambda: self._socket(self._kick),
            "invalid frames": lambda: self._socket(self._abuse),
            "a frame with an unknown opcode": lambda: self._socket(Client.closed, b"\x83\x80\x00\x00\x00\x00"),
            "a frame that is too long": lambda: self._socket(
                Client.closed, b"\x81\xff\x00\x00\x00\x00\xff\x00\x00\x00\x00\x00\x00\x00"
            ),
            "no handshake token, and then silence": lambda: self._stranger(None, Client.drop),
            "a late token": lambda: self._stranger(token, Client.close),
            "a wrong late token": lambda: self._stranger(WRONG, Client.closed),
            "a wrong handshake token": self._refused,
            "an incomplete handshake": lambda: self._raw(upgrade + b"\r\n"),
            "a handshake that the library refuses": lambda: self._raw(upgrade + b"X: " + b"x" * 9_000 + b"\r\n\r\n"),
            "no request": lambda: self._raw(b"", is_aborted=True),
            "no HTTP": lambda: self._raw(b"\x00\x01\r\n\r\n"),
            "a request": lambda: self._request(token),
            "a request with a wrong token": lambda: self._request(WRONG),
            "a request without its end": lambda: self._raw(call + b"Content-Length: 9\r\n\r\nx", is_aborted=True),
            "a request with too many headers": lambda: self._raw(call + b"X: x\r\n" * 200),
        }

    async def _socket(self, end: Callable[[Client], Awaitable[object]], last: bytes = b"") -> None:
        one = Client(self._world.url, self._who.token)
        await one.open()
        await one.settled()
        await one.call(Ping())
        one.socket.transport.write(last)
        await end(one)

    async def _stranger(self, token: str | None, end: Callable[[Client], Awaitable[object]]) -> None:
        one = Client(self._world.url, None)
        await one.open()
        if token is not None:
            await one.socket.send(f'{{"type": "authenticate", "token": "{token}"}}')
        if token == self._who.token:
            await one.settled()
        await end(one)

    async def _refused(self) -> None:
        with pytest.raises(InvalidStatus):
            await Client(self._world.url, WRONG).open()

    async def _kick(self, one: Client) -> None:
        for connections in self._world.workers[0].app.connections._slices:  # noqa: SLF001
            for connection in list(connections):
                connection.close(CloseCode.GOING_AWAY)
        await one.closed()

    async def _abuse(self, one: Client) -> None:
        for _ in range(300):
            await one.socket.send("{")
        await one.closed()

    async def _raw(self, data: bytes, *, is_aborted: bool = False) -> None:
        host, port = self._world.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        if is_aborted:
            await until(lambda: bool(alive()))
            writer.transport.abort()
        else:
            await reader.read()
            writer.close()

    async def _request(self, token: str) -> None:
        async with http_client(self._world.url) as http:
            await http.post("/v1/call", content=PING, headers={"Authorization": f"Bearer {token}"})


async def test_connections_are_freed_without_the_garbage_collector(world: World) -> None:
    ways = Ways(world, await world.user("Ada")).all()
    kept = {}
    with no_collector():
        assert not alive()
        for name, way in ways.items():
            await way()
            try:
                await until(lambda: not alive(), seconds=3)
            except TimeoutError:
                kept[name] = alive()
                gc.collect()
    assert not kept
