"""Frames that will be dropped: the number that is parsed is bounded at every stage of a connection."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import msgspec
import pytest
from websockets.frames import Opcode

from protocol.errors import CloseCode
from protocol.server import GoingAway
from server.core.config import Settings
from server.gateway import websocket
from server.gateway.connection import MAX_INBOX
from server.gateway.http_protocol import MAX_CHUNKS, MAX_HEADERS, Http
from server.gateway.sockets import LINGER_BYTES, PROXY
from server.gateway.websocket import WebSocket
from tests.test_floods import shake
from tests.test_frames import Wire, frame
from tests.test_lock_order import WAITS
from tests.test_silence import CHUNKED, assert_nothing_is_kept, dial, received, with_token
from tests.test_unfinished import next_answer
from tests.world import World, until

BURST = 800
"""Frames that a connection of the test may send in a burst: four seconds of its `frame_rate`."""
READ_BYTES = 256 * 1024
"""Max bytes of one read of the event loop."""
TINY = {
    "texts": frame(b""),
    "binaries": frame(b"", Opcode.BINARY),
    "pings": frame(b"", Opcode.PING),
    "fragments": frame(b"", fin=False),
}


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, frame_rate=BURST / 4), workers=1) as world:
        yield world


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the parsed frames, headers and chunks, by the method that receives them."""
    found: Counter[str] = Counter()

    def count(kind: type, name: str) -> None:
        method: Callable[..., Any] = getattr(kind, name)

        def counted(self: object, *args: object) -> object:
            found[name] += 1
            return method(self, *args)

        monkeypatch.setattr(kind, name, counted)

    count(WebSocket, "_frame")
    count(Http, "on_header")
    count(Http, "on_body")
    return found


async def refused(world: World) -> Wire:
    wire = await shake(world.url, None)
    wire.writer.write(frame(b"{}"))
    return wire


async def closed(world: World) -> Wire:
    ada = await world.user("Ada")
    wire = await shake(world.url, ada)
    await until(lambda: len(world.workers[0].app.connections) == 1)
    (one,) = world.workers[0].app.hub.online_users.sockets(ada.id)
    one.close(CloseCode.SILENT)
    return wire


STAGES = {"a refused login": (refused, CloseCode.UNAUTHENTICATED), "a close": (closed, CloseCode.SILENT)}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("stage", STAGES)
async def test_number_of_frames_parsed_after_the_close_frame_is_bounded(  # noqa: PLR0917 - fixtures
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls: Counter[str],
    stage: str,
    kind: str,
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 600.0)
    begin, code = STAGES[stage]
    wire = await begin(alone)
    assert await wire.closed() == code
    calls.clear()
    with contextlib.suppress(ConnectionError):
        for _ in range(LINGER_BYTES // 100_000):
            wire.writer.write(TINY[kind] * (100_000 // len(TINY[kind])))
            await wire.writer.drain()
    wire.writer.close()
    await until(lambda: len(alone.workers[0].app.sockets) == 0)
    assert 0 < calls["_frame"] <= 2 * BURST
    # A client that had sent many frames before it read the close frame is not blamed.
    assert not any("4003" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("begin", "piece", "status"),
    [
        (b"", b"GET /readyz HTTP/1.1\r\nHost: here\r\n\r\n", b""),
        (b"", b"GET /readyz HTTP/1.1\r\na: b\r\n\r\n", b"HTTP/1.1 400"),
        (b"", b"GET /readyz HTTP/1.1\r\nHost: here\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n", b"HTTP/1.1 429"),
        (CHUNKED, b"1\r\n \r\n", b"HTTP/1.1 503"),
    ],
    ids=["pipelined", "no host", "too many from an address", "too long body"],
)
async def test_data_after_a_refused_request_is_not_parsed(  # noqa: PLR0917 - fixtures
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    calls: Counter[str],
    begin: bytes,
    piece: bytes,
    status: bytes,
) -> None:
    monkeypatch.setattr("server.gateway.http_protocol.FREE_BYTES", 0)
    async with World(msgspec.structs.replace(settings, trusted_proxies="1"), workers=1) as world:
        sockets = world.workers[0].app.sockets
        begin = await with_token(world, begin)
        sockets.unread.most = 100
        sockets._of_address["10.0.0.1"] = sockets._per_address  # noqa: SLF001
        calls.clear()
        reader, writer = await dial(world)
        writer.write(begin + piece * 3_000)
        assert (await received(reader)).startswith(status)
        assert 0 < calls["on_header"] + calls["on_body"] < 100
        writer.transport.abort()
        await until(lambda: len(sockets) == 0)


async def test_bytes_of_a_pipelined_request_count_until_its_response(settings: Settings) -> None:
    """The response to the previous request releases only the bytes of that one. The connection does not become idle."""
    async with World(msgspec.structs.replace(settings, trusted_proxies="1"), workers=1) as world:
        sockets, size = world.workers[0].app.sockets, 20_000
        head = b"POST /v1/call HTTP/1.1\r\nHost: here\r\nX-Forwarded-For: 10.0.0.%d\r\nContent-Length: %d\r\n\r\n"
        reader, writer = await dial(world)
        bodies = [head % (number, size) + b" " * size for number in (1, 2)]
        writer.write(b"".join(bodies)[:-1])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
        await until(lambda: sockets.unread.taken <= size)
        assert sockets.unread._held == {"10.0.0.2": size - 1}  # noqa: SLF001
        assert (sockets._of_address, sockets._waiting) == ({"10.0.0.2": 1}, {})  # noqa: SLF001
        writer.write(b" ")
        assert b"HTTP/1.1 401" in await reader.readuntil(b"\r\n\r\n")
        await until(lambda: bool(sockets._waiting))  # noqa: SLF001
        assert (sockets.unread.taken, sockets._of_address) == (0, {PROXY: 1})  # noqa: SLF001
        writer.transport.abort()
        await until(lambda: len(sockets) == 0)
        assert_nothing_is_kept(sockets)


async def test_client_may_finish_the_close_handshake(alone: World) -> None:
    """Its frames in flight are dropped, and its close frame is read."""
    wire = await closed(alone)
    wire.writer.write(frame(b'{"type":"ping"}') * 100 + frame(b"\x0f\xa9", Opcode.CLOSE))
    assert await wire.closed() == CloseCode.SILENT
    assert await wire.reader.read() == b""
    wire.writer.close()


async def busy(alone: World, wire: Wire, request: int) -> "asyncpg.Connection[asyncpg.Record]":
    """Send a frame that waits for a locked table, and return the connection that holds the lock."""
    holding = await asyncpg.connect(alone.settings.database_url)
    await holding.execute("BEGIN; LOCK TABLE draft IN ACCESS EXCLUSIVE MODE")
    wire.writer.write(frame(b'{"type":"list_drafts","id":%d}' % request))
    while not await alone.db.fetchval(WAITS):
        await asyncio.sleep(0)
    return holding


async def test_frames_of_one_read_are_parsed_when_the_inbox_has_room(
    alone: World, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest counts as unread and is answered later in order, including a last frame that has arrived by half."""
    monkeypatch.setattr(websocket, "FREE_BYTES", 0)
    ada, count = await alone.user("Ada"), BURST // 2
    app = alone.workers[0].app
    wire = await shake(alone.url, ada)
    await until(lambda: len(app.connections) == 1)
    (one,) = app.hub.online_users.sockets(ada.id)
    holding = await busy(alone, wire, 0)
    calls.clear()
    pings = [frame(b'{"type":"ping","id":%d}' % (1 + number)) for number in range(count)]
    wire.writer.write(b"".join(pings)[:-5])
    await until(lambda: one.socket.read_paused)  # type: ignore[attr-defined]
    assert calls["_frame"] == MAX_INBOX
    assert app.sockets.unread_of_users.taken == sum(map(len, pings[MAX_INBOX:])) - 5
    await holding.close()
    assert [(await next_answer(wire))["re"] for _ in range(count)] == list(range(count))
    wire.writer.write(pings[-1][-5:])
    assert (await next_answer(wire))["re"] == count
    assert app.sockets.unread_of_users.taken == 0

    calls.clear()
    wire.writer.write(frame(b"") * (READ_BYTES // len(frame(b""))))
    assert await wire.closed() == CloseCode.ABUSE
    assert calls["_frame"] < 2 * BURST
    wire.writer.transport.abort()
    await until(lambda: len(app.sockets) == 0)
    assert_nothing_is_kept(app.sockets)


async def test_socket_is_not_read_while_its_connection_finishes(alone: World, calls: Counter[str]) -> None:
    ada = await alone.user("Ada")
    app = alone.workers[0].app
    wire = await shake(alone.url, ada)
    await until(lambda: len(app.connections) == 1)
    (one,) = app.hub.online_users.sockets(ada.id)
    holding = await busy(alone, wire, 1)
    one.finish(GoingAway(reconnect_after_ms=0, ticket=""), CloseCode.GOING_AWAY)  # type: ignore[attr-defined]
    calls.clear()
    wire.writer.write(frame(b"") * 1_000_000)
    await until(lambda: one.socket.read_paused)  # type: ignore[attr-defined]
    assert calls["_frame"] == 1
    await holding.close()
    assert await wire.closed() == CloseCode.GOING_AWAY
    wire.writer.transport.abort()


@pytest.mark.parametrize(
    ("begin", "piece", "most", "reason"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: here\r\n", b"a:b\r\n", MAX_HEADERS - 1, b"more than 128 headers"),
        (CHUNKED, b"1\r\n \r\n", MAX_CHUNKS - 1, b"more than 4,096 chunks"),
        (CHUNKED + b"0\r\n", b"a:b\r\n", MAX_HEADERS - 3, b"more than 128 headers"),
    ],
    ids=["headers", "chunks", "trailers"],
)
async def test_request_has_a_bounded_number_of_parts(  # noqa: PLR0917 - fixtures
    alone: World, calls: Counter[str], begin: bytes, piece: bytes, most: int, reason: bytes
) -> None:
    """Each part costs as much as hundreds of bytes. One request of many parts took 0.2 seconds."""
    begin = await with_token(alone, begin)
    end = b"0\r\n\r\n" if b"1\r" in piece else b"\r\n"
    for count in (most, most + 1, 12_000):
        calls.clear()
        reader, writer = await dial(alone)
        writer.write(begin + piece * count + end)
        response = await reader.readuntil(b"\r\n\r\n") + await reader.read(500)
        assert response.startswith(b"HTTP/1.1 ")
        assert (reason in response) == (count > most), (count, response)
        assert calls["on_header"] + calls["on_body"] <= MAX_HEADERS + MAX_CHUNKS + 5
        writer.close()
    await until(lambda: len(alone.workers[0].app.sockets) == 0)
