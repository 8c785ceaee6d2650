"""Floods of pings, fragments or empty frames close the connection, and memory does not grow."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec
import pytest
from websockets.frames import Opcode

from protocol import SUBPROTOCOL, client
from protocol.client import Authenticate
from protocol.codec import encode
from protocol.errors import CloseCode
from prove.client import Client
from server.core.config import Settings
from server.core.periodic import end
from server.gateway import websocket
from server.gateway.sockets import LINGER_BYTES
from server.gateway.websocket import MAX_EARLY_BYTES, MAX_FRAGMENTS
from tests.cluster import Cluster
from tests.test_frames import Wire, frame
from tests.test_lock_order import WAITS
from tests.world import UserSession, World, until

PATIENCE = 10.0
GROWTH = 8 * 1024
"""Max growth of a worker, kilobytes. Without bounds, it would be hundreds of times as much."""
HEAD = (
    b"GET /v1/ws HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: " + SUBPROTOCOL.encode() + b"\r\n"
)
PING = frame(b"x" * 125, Opcode.PING)
FLOODS = {
    "pings": PING,
    "pongs": frame(b"", Opcode.PONG),
    "empty fragments": frame(b"", Opcode.CONT, fin=False),
    "small fragments": frame(b" ", Opcode.CONT, fin=False),
    "empty binary messages": frame(b"", Opcode.BINARY),
    "messages of two fragments": frame(b"", Opcode.TEXT, fin=False) + frame(b"", Opcode.CONT),
}
"""Frames by kind of flood. Continuation frames are sent after the first frame of a message."""


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, frame_rate=200.0), workers=1) as world:
        yield world


async def shake(url: str, who: UserSession | None) -> Wire:
    """Open a WebSocket, with the token of a user or without one."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    wire = Wire(*await asyncio.open_connection(host, int(port)))
    token = b"" if who is None else b"Authorization: Bearer " + who.token.encode() + b"\r\n"
    wire.writer.write(HEAD + token + b"\r\n")
    assert b" 101 " in await wire.reader.readuntil(b"\r\n\r\n")
    return wire


def memory(process: int) -> int:
    """Return the resident memory of a process, kilobytes."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


# Before login, only one message is read.
@pytest.mark.parametrize(
    ("name", "is_known"),
    [(name, is_known) for is_known in (True, False) for name in FLOODS if is_known or "messages" not in name],
)
async def test_flood_is_closed_as_abuse_and_the_log_names_the_sender(
    alone: World,
    caplog: pytest.LogCaptureFixture,
    name: str,
    is_known: bool,  # noqa: FBT001
) -> None:
    ada = await alone.user("Ada")
    wire = await shake(alone.url, ada if is_known else None)
    beginning = frame(b" ", fin=False) if name.endswith("l fragments") or name == "empty fragments" else b""
    wire.writer.write(beginning + FLOODS[name] * 3_000)
    assert await wire.closed() == CloseCode.ABUSE
    (said,) = [record.message for record in caplog.records if "4003" in record.message]
    who = f"a connection of user {ada.id}" if is_known else "a connection from address 127.0.0.1"
    assert said.startswith(f"closing {who} with 4003")
    wire.writer.transport.abort()
    await until(lambda: len(alone.workers[0].app.sockets) == 0)


LARGE = b" " * 3_000_000
ENDS = {
    "too long": (frame(LARGE), CloseCode.TOO_BIG),
    "not masked": (frame(b"{}", mask=False) + LARGE, 1002),
    "a reserved bit": (b"\xc1" + frame(b"{}")[1:] + LARGE, 1002),
    "a flood": (PING * 25_000, CloseCode.ABUSE),
}
"""Forbidden data with megabytes behind it, and the close code."""


@pytest.mark.parametrize("is_known", [True, False])
async def test_client_that_sends_everything_before_reading_gets_the_close_code(
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    is_known: bool,  # noqa: FBT001
) -> None:
    """If the server closed a socket with unread bytes, TCP would reset it and the client would lose the close frame."""
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 600.0)  # the client ends the connection after the close frame
    host, _, port = alone.url.removeprefix("http://").rpartition(":")
    ada = await alone.user("Ada")
    token = b"Authorization: Bearer " + ada.token.encode() + b"\r\n" if is_known else b""
    sockets = alone.workers[0].app.sockets

    def asked(data: bytes) -> bytes:
        with socket.create_connection((host, int(port)), PATIENCE) as one:
            one.sendall(HEAD + token + b"\r\n")
            assert b" 101 " in one.recv(65_536)
            one.sendall(data)
            said = b""
            while more := one.recv(65_536):
                said += more
            return said

    for name, (data, code) in ENDS.items():
        said = await asyncio.to_thread(asked, data)
        assert b"\x88" in said, name
        assert code.to_bytes(2) in said[said.rindex(b"\x88") :], name
        await until(lambda: len(sockets) == 0)
        assert not sockets._waiting  # noqa: SLF001


@pytest.mark.parametrize("more", [b"", b"x"])
async def test_closed_client_that_stays_connected_frees_its_place_and_is_disconnected(
    alone: World, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 0.3)
    wire = await shake(alone.url, await alone.user("Ada"))
    sockets = alone.workers[0].app.sockets
    wire.writer.write(frame(b"{}", mask=False) + b"x" * 100_000)
    assert await wire.closed() == 1002
    assert len(sockets) == len(sockets._waiting) == 1  # noqa: SLF001

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                wire.writer.write(more)
                await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    await until(lambda: len(sockets) == 0)
    await end([dripping])
    assert not sockets._waiting  # noqa: SLF001
    wire.writer.transport.abort()


async def test_number_of_bytes_dropped_after_a_close_is_bounded(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 600.0)
    ada = await alone.user("Ada")
    sockets = alone.workers[0].app.sockets
    for is_broken in (True, False):
        wire = await shake(alone.url, ada)
        await until(lambda: len(alone.workers[0].app.connections) == 1)
        (one,) = alone.workers[0].app.hub.online_users.sockets(ada.id)
        if not is_broken:
            one.close(CloseCode.SILENT)
        with contextlib.suppress(ConnectionError):
            wire.writer.write(frame(b"{}", mask=False) if is_broken else b"")
            for _ in range(2 * LINGER_BYTES // 100_000):
                wire.writer.write(frame(b" " * 100_000))
                await wire.writer.drain()
        await until(lambda: len(sockets) == 0)
        wire.writer.transport.abort()


async def test_only_the_newest_of_many_pings_is_answered(alone: World) -> None:
    wire = await shake(alone.url, await alone.user("Ada"))
    wire.writer.write(b"".join(frame(str(number).encode(), Opcode.PING) for number in range(300)))
    answered: list[bytes] = []
    async with asyncio.timeout(PATIENCE):
        while not answered or answered[-1] != b"299":
            kind, payload = await wire.frame()
            if kind == Opcode.PONG:
                answered.append(payload)
    assert len(answered) < 10
    wire.writer.transport.abort()


async def test_number_of_fragments_of_a_message_is_bounded(alone: World) -> None:
    ada = await alone.user("Ada")
    pieces = [b'{"type":"ping","id":7}'] + [b""] * (MAX_FRAGMENTS - 1)
    for more, is_answered in ((0, True), (1, False)):
        wire = await shake(alone.url, ada)
        cut = [*pieces, *([b""] * more)]
        wire.writer.write(
            b"".join(
                frame(piece, Opcode.CONT if number else Opcode.TEXT, fin=number == len(cut) - 1)
                for number, piece in enumerate(cut)
            )
        )
        if is_answered:
            async with asyncio.timeout(PATIENCE):
                while (await wire.hear()).get("re") != 7:
                    pass
        else:
            assert await wire.closed() == CloseCode.ABUSE
        wire.writer.transport.abort()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b" " * (MAX_EARLY_BYTES + 1)), CloseCode.TOO_BIG),
        (frame(b" " * MAX_EARLY_BYTES), CloseCode.UNAUTHENTICATED),
        (frame(b"\xff\xfe"), CloseCode.UNAUTHENTICATED),
        (frame(b" " * MAX_EARLY_BYTES, fin=False) + frame(b" ", Opcode.CONT), CloseCode.TOO_BIG),
        (frame(b" " * (MAX_EARLY_BYTES + 1))[:100], CloseCode.TOO_BIG),
    ],
    ids=["too long", "longest allowed, but invalid", "not UTF-8", "too long in total", "too long by its header"],
)
async def test_size_of_a_message_before_login_is_bounded(alone: World, data: bytes, code: int) -> None:
    wire = await shake(alone.url, None)
    wire.writer.write(data)
    assert await wire.closed() == code
    wire.writer.transport.abort()


@pytest.mark.parametrize("size", [10, 100_000])
async def test_frames_sent_together_with_the_login_are_not_lost(alone: World, size: int) -> None:
    ada = await alone.user("Ada")
    wire = await shake(alone.url, None)
    login = frame(encode(Authenticate(token=ada.token)))
    questions = [frame(b'{"type":"ping","id":%d}' % number + b" " * size) for number in range(5)]
    wire.writer.write(login + b"".join(questions))
    answered: list[object] = []
    async with asyncio.timeout(PATIENCE):
        while len(answered) < len(questions):
            if (said := await wire.hear()).get("type") == "reply":
                answered.append(said["re"])
    assert answered == list(range(len(questions)))
    wire.writer.transport.abort()
    await until(lambda: len(alone.workers[0].app.sockets) == 0)
    assert alone.workers[0].app.sockets.unread.taken == 0


async def test_frames_before_the_handshake_response_are_not_read(alone: World) -> None:
    app = alone.workers[0].app
    host, _, port = alone.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    holding = await asyncpg.connect(alone.settings.database_url)
    await holding.execute("BEGIN; LOCK TABLE session IN ACCESS EXCLUSIVE MODE")
    writer.write(HEAD + b"Authorization: Bearer " + b"x" * 43 + b"\r\n\r\n")
    while not await alone.db.fetchval(WAITS):
        await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            writer.write(PING * 500)
            await writer.drain()
    await until(lambda: len(app.sockets) == 0)
    assert await alone.db.fetchval(WAITS), "closed because of the frames, not after the response"
    await holding.close()
    writer.transport.abort()


@pytest.mark.parametrize("is_known", [True, False], ids=["logged in", "before login"])
@pytest.mark.parametrize("name", ["pings", "empty fragments"])
async def test_flood_does_not_grow_the_memory_of_a_worker(
    settings: Settings,
    tmp_path: Path,
    name: str,
    is_known: bool,  # noqa: FBT001
) -> None:
    settings = msgspec.structs.replace(settings, frame_rate=200.0)
    cluster = Cluster(settings, tmp_path, 1)
    (url,) = cluster.urls()
    try:
        await cluster.start(*cluster.workers)
        process = cluster.workers[0].process
        assert process is not None
        async with World(settings, workers=0) as world:
            ada, charles = await world.users("Ada", "Charles")
            async with Client(url, charles.token) as bystander:
                most = before = memory(process.pid)
                beginning = b"" if name == "pings" else frame(b" ", fin=False)
                for _ in range(2):
                    wire = await shake(url, ada if is_known else None)
                    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
                    wire.writer.write(beginning)
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        async with asyncio.timeout(0.5):
                            for _ in range(500):
                                wire.writer.write(FLOODS[name] * 5_000)
                                await wire.writer.drain()
                    await bystander.call(client.Ping())
                    most = max(most, memory(process.pid))
                    wire.writer.transport.abort()
                assert most - before < GROWTH
    finally:
        cluster.stop()
