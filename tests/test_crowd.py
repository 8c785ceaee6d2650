"""Each connection of `openchat load` has one socket, whatever the server does while the connection is opened."""

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

import msgspec
import pytest

from loadtest.connection import User
from loadtest.counters import Tally
from loadtest.crowd import Crowd
from loadtest.orders import Connect, Order, Settle
from protocol.codec import text_frame
from tests.relay import frame_of

CHAT = str(uuid4())
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
GOING_AWAY = text_frame(b'{"type":"going_away","reconnect_after_ms":20}') + b"\x88\x02\x03\xf4"
LATER = b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"retry_after_ms":20}'
MISSED = text_frame(b'{"type":"message_sent","conversation_id":"%s","version":2}' % CHAT.encode())
TRIED_AGAIN = b"\x88\x02\x03\xf5"
"""A close frame with the code 1013."""


def first_page() -> bytes:
    page = {"conversations": [{"version": 1, "me": {"conversation_id": CHAT}}], "is_last": True}
    return text_frame(b'{"type":"ready","epoch":"1"}') + text_frame(
        msgspec.json.encode({"type": "conversation_page", **page})
    )


class Reluctant:
    """A server that ends the first connection, fails the second one with `answer`, and accepts all others."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.count = 0
        self.resumed: list[dict[str, int]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        await reader.readuntil(b"\r\n\r\n")
        if self.count == 1:
            writer.write(UPGRADED + first_page() + GOING_AWAY)
        elif self.count == 2:
            writer.write(self._answer)
        else:
            writer.write(UPGRADED)
            _, payload = await frame_of(reader)
            frame = msgspec.json.decode(payload)
            self.resumed.append(frame["versions"])
            writer.write(text_frame(b'{"type":"reply","re":%d}' % frame["id"]))
            await reader.read()  # until the client ends it
        writer.close()


async def crowd_of_one(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Tally:
    """Connect one person to a server, wait until all connections are settled, and return the counts."""
    crowd, orders = Crowd(), asyncio.StreamReader()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address, port = server.sockets[0].getsockname()
        user = User(token="", user_id="", source="", conversations=[CHAT])
        given: list[Order] = [
            Connect(
                connection="loadtest.connection:Connection", host="here", address=address, port=port, users=[user],
                members={}, at_once=1,
            ),
            # As in a run: the second one waits for what was begun during the first one.
            *[Settle(versions={}, seconds=10.0)] * 2,
        ]  # fmt: skip
        orders.feed_data(b"".join(msgspec.json.encode(order) + b"\n" for order in given))
        orders.feed_eof()
        await crowd.serve(orders)
        for connection in crowd.connections:
            connection.transport.abort()
    return crowd.counters.take()


@pytest.fixture(autouse=True)
def _no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all counts until the end, and do not write reports to the output of the tests."""
    monkeypatch.setattr("loadtest.crowd.TICK_SECONDS", 1_000.0)
    monkeypatch.setattr("loadtest.crowd.emit", lambda _: None)


@pytest.mark.parametrize(
    ("answer", "deferred", "version"),
    [
        pytest.param(LATER, 1, 1, id="it asks to connect later"),
        pytest.param(UPGRADED + GOING_AWAY, 1, 1, id="it goes away before the missed changes"),
        pytest.param(UPGRADED + TRIED_AGAIN, 0, 1, id="it closes before the missed changes"),
        pytest.param(UPGRADED + MISSED, 0, 2, id="it ends within the missed changes"),
        pytest.param(b"", 0, 1, id="it ends without an answer"),
    ],
)
async def test_connection_that_is_not_opened_is_tried_again_once(answer: bytes, deferred: int, version: int) -> None:
    server = Reluctant(answer)
    tally = await crowd_of_one(server)
    assert (server.count, server.resumed) == (3, [{CHAT: version}])
    assert (tally.connected, tally.resumed, tally.deferred) == (1, 1, deferred)
    assert (tally.errors, tally.wrong) == ({}, 0)


async def test_connection_that_is_never_answered_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.crowd.TIMEOUT_SECONDS", 0.2)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not server:
            server.append(writer)
            writer.write(UPGRADED + first_page() + GOING_AWAY)
            writer.close()
        else:
            await asyncio.gather(reader.read(), return_exceptions=True)
            ended.set()
            writer.close()

    server: list[asyncio.StreamWriter] = []
    tally = await crowd_of_one(serve)
    async with asyncio.timeout(5):
        await ended.wait()
    assert tally.errors == {"could not reconnect": 1}
