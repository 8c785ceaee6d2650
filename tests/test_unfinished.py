"""Unfinished messages: their bytes are limited per user, and each message has a deadline."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest
from websockets.frames import Opcode

from protocol.client import Authenticate
from protocol.codec import encode
from protocol.errors import CloseCode
from protocol.limits import MAX_FRAME_BYTES
from server.core.config import Settings
from server.core.periodic import end
from server.fairness.shared_bound import CLIENT_SHARE_DIVISOR
from server.gateway import websocket
from server.gateway.connection import MAX_INBOX
from server.gateway.sockets import FREE_BYTES, UNREAD_BYTES
from tests.test_floods import HEAD
from tests.test_frames import Wire, frame
from tests.test_lock_order import WAITS
from tests.test_silence import Streams, assert_nothing_is_kept, dial, drip, received
from tests.world import UserSession, World, http_client, until

SHORT = 0.3
LARGE = frame(b" " * MAX_FRAME_BYTES)
CUT = frame(b'{"type":"ping",', fin=False)
PING = frame(b'{"type":"ping","id":1}')
BLANKS = b" " * (MAX_FRAME_BYTES // 101)


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[World]:
    async with World(settings, workers=1) as world:
        yield world


async def shake(world: World, who: UserSession | None, source: str = "127.0.0.1") -> Wire:
    """Return a WebSocket, authenticated as a user or not."""
    host, _, port = world.url.removeprefix("http://").rpartition(":")
    wire = Wire(*await asyncio.open_connection(host, int(port), local_addr=(source, 0)))
    token = b"" if who is None else b"Authorization: Bearer " + who.token.encode() + b"\r\n"
    wire.writer.write(HEAD + token + b"\r\n")
    assert b" 101 " in await wire.reader.readuntil(b"\r\n\r\n")
    assert who is None or (await wire.hear())["type"] == "ready"
    return wire


async def next_answer(wire: Wire) -> dict[str, object]:
    """Return the next reply or error of a connection, and skip events."""
    while True:
        kind, payload = await wire.frame()
        if kind == Opcode.TEXT and (said := msgspec.json.decode(payload))["type"] in {"reply", "error"}:
            return dict(said)


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (LARGE[:1], b""),
        (LARGE[:10], b""),
        (LARGE[:-1_000], b" "),
        (frame(b"", fin=False), b""),
        (frame(b" " * 1_000, fin=False), frame(b"", Opcode.PING)),
        (frame(b" ", fin=False) + frame(b" ", Opcode.CONT, fin=False) * 9 + LARGE[:1], b""),
        (frame(b" ", Opcode.BINARY, fin=False), b""),
    ],
    ids=["byte", "half-header", "dripping-frame", "nothing", "fragment-and-pings", "fragments", "binary"],
)
async def test_unfinished_message_closes_its_connection(
    alone: World, monkeypatch: pytest.MonkeyPatch, begin: bytes, more: bytes
) -> None:
    monkeypatch.setattr(websocket, "MESSAGE_SECONDS", SHORT)
    sockets = alone.workers[0].app.sockets
    wire = await shake(alone, await alone.user("Ada"))
    wire.writer.write(PING + begin)
    assert (await next_answer(wire))["type"] == "reply"
    dripping = asyncio.create_task(drip((wire.reader, wire.writer), more)) if more else None
    assert (said := await next_answer(wire))["code"] == "bad_frame", said
    assert "within 0 seconds" in str(said["message"])
    assert await wire.closed() == CloseCode.SILENT
    assert sockets.timed_out == 1
    if dripping is not None:
        await end([dripping])
    wire.writer.close()
    await until(lambda: len(sockets) == 0)
    assert_nothing_is_kept(sockets)


async def test_each_message_has_its_own_deadline(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends continuously always has an unfinished message."""
    monkeypatch.setattr(websocket, "MESSAGE_SECONDS", 3 * SHORT)
    loop = asyncio.get_running_loop()
    wire = await shake(alone, await alone.user("Ada"))
    cut = frame(b'{"type":"ping",', fin=False) + frame(b'"id":1}', Opcode.CONT)
    message, count, until_ = PING + cut, 0, loop.time() + 5 * SHORT
    wire.writer.write(message[:-3])
    while loop.time() < until_:
        wire.writer.write(message[-3:] + message[:-3])
        count += 2
        for _ in range(2):
            assert (await next_answer(wire))["type"] == "reply"
        await asyncio.sleep(SHORT / 5)
    assert count > 20
    wire.writer.transport.abort()


@pytest.mark.parametrize(
    ("begin", "more"),
    [(LARGE[:1], LARGE[1:2]), (LARGE[:2], LARGE[2:14]), (CUT[:-1], CUT[-1:])],
    ids=["two-bytes", "header", "fragment"],
)
async def test_complete_parts_do_not_extend_the_deadline_of_a_message(
    alone: World, monkeypatch: pytest.MonkeyPatch, begin: bytes, more: bytes
) -> None:
    monkeypatch.setattr(websocket, "MESSAGE_SECONDS", most := 4 * SHORT)
    loop = asyncio.get_running_loop()
    wire = await shake(alone, await alone.user("Ada"))
    began = loop.time()
    wire.writer.write(begin)
    loop.call_later(0.8 * most, wire.writer.write, more)
    assert (await next_answer(wire))["code"] == "bad_frame"
    assert loop.time() - began < 1.5 * most
    assert await wire.closed() == CloseCode.SILENT
    wire.writer.transport.abort()


async def test_time_while_the_server_does_not_read_does_not_count(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "MESSAGE_SECONDS", SHORT)
    ada = await alone.user("Ada")
    wire = await shake(alone, ada)
    (one,) = alone.workers[0].app.hub.online_users.sockets(ada.id)
    holding = await asyncpg.connect(alone.settings.database_url)
    await holding.execute("BEGIN; LOCK TABLE draft IN ACCESS EXCLUSIVE MODE")
    wire.writer.write(frame(b'{"type":"list_drafts","id":1}'))
    while not await alone.db.fetchval(WAITS):
        await asyncio.sleep(0)
    wire.writer.write(PING * MAX_INBOX + PING[:-1])
    await until(lambda: one.socket.read_paused)  # type: ignore[attr-defined]
    await asyncio.sleep(2 * SHORT)
    await holding.close()
    for _ in range(MAX_INBOX + 1):
        assert (await next_answer(wire))["type"] == "reply"
    wire.writer.write(PING[-1:])
    assert (await next_answer(wire))["type"] == "reply"
    wire.writer.transport.abort()


@pytest.mark.parametrize(
    "begin",
    [
        LARGE[:-1_000],
        frame(BLANKS, fin=False) + frame(BLANKS, Opcode.CONT, fin=False) * 99,
    ],
    ids=["frames", "fragments"],
)
async def test_bytes_of_unfinished_messages_are_limited_per_user(alone: World, begin: bytes) -> None:
    """Without the limit, fifty sockets of each user could hold 250 KB each for any time."""
    sockets = alone.workers[0].app.sockets
    share = UNREAD_BYTES // CLIENT_SHARE_DIVISOR
    ada, eve = await alone.users("Ada", "Eve")
    held: list[Wire] = []
    for number in range(share // (len(begin) - FREE_BYTES)):
        held.append(await shake(alone, ada, f"127.0.0.{2 + number}"))
        held[-1].writer.write(begin)
    await until(lambda: sockets.unread_of_users.taken > len(held) * 250_000)
    assert sockets.unread_of_users.taken <= share
    # One more message is refused with a retry time. Others continue, and so does another user at the same address.
    late, other = await shake(alone, ada, "127.0.0.2"), await shake(alone, eve, "127.0.0.2")
    with contextlib.suppress(ConnectionError):
        late.writer.write(begin + begin[:1_000])
    said = await next_answer(late)
    assert (said["code"], bool(said["retry_after_ms"])) == ("unavailable", True)
    assert await late.closed() == CloseCode.GOING_AWAY
    await assert_takes_a_frame_in_two_reads(alone, other, eve)
    held[0].writer.write(PING if len(begin) > len(BLANKS) * 100 else b"")
    assert sockets.unread.taken == 0
    for wire in (*held, late, other):
        wire.writer.transport.abort()
    await until(lambda: len(sockets) == 0)
    assert_nothing_is_kept(sockets)


async def assert_takes_a_frame_in_two_reads(world: World, wire: Wire, who: UserSession) -> None:
    held = world.workers[0].app.sockets.unread_of_users._held  # noqa: SLF001
    padded = frame(b'{"type":"ping","id":1}' + b" " * 200_000)
    wire.writer.write(padded[:150_000])
    await until(lambda: held.get(who.id, 0) == 150_000 - FREE_BYTES)
    wire.writer.write(padded[150_000:])
    assert (await next_answer(wire))["type"] == "reply"


async def test_unauthenticated_clients_cannot_close_connections_or_block_logins(alone: World) -> None:
    """Unfinished bodies from 30 addresses leave a new address less than a kilobyte."""
    sockets = alone.workers[0].app.sockets
    ada = await alone.user("Ada")
    wire = await shake(alone, ada)
    body = b" " * MAX_FRAME_BYTES
    held: list[Streams] = []
    begin = b"POST /v1/auth/login HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body)
    for number in range(30):
        share = (UNREAD_BYTES - sockets.unread.taken) // CLIENT_SHARE_DIVISOR
        taken = sockets.unread.taken + share
        while share:
            size = min(share, len(body) - 1 - FREE_BYTES)
            held.append(await dial(alone, f"127.0.1.{1 + number}"))
            held[-1][1].write(begin + body[: FREE_BYTES + size])
            share -= size
        await until(lambda: sockets.unread.taken == taken)  # noqa: B023
    assert (UNREAD_BYTES - sockets.unread.taken) // CLIENT_SHARE_DIVISOR < 1_000

    await assert_takes_a_frame_in_two_reads(alone, wire, ada)
    async with http_client(alone.url) as http:
        headers = {"Authorization": f"Bearer {ada.token}"}
        answer = await http.post("/v1/call", content=b'{"type":"ping"}'.ljust(FREE_BYTES - 100), headers=headers)
        assert answer.status_code == 200
        answer = await http.post("/v1/call", content=b'{"type":"ping"}'.ljust(FREE_BYTES + 10_000), headers=headers)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        login = b'{"email":"nobody@example.com","password":"not the password"}'
        answer = await http.post("/v1/auth/login", content=login.ljust(2_000))
        assert answer.status_code == 401, answer.text
    # Bytes after `authenticate` in the same read count for the user, once the token is verified.
    early = await shake(alone, None)
    early.writer.write(frame(encode(Authenticate(token=ada.token))) + PING + LARGE[:2_000])
    assert (await next_answer(early))["type"] == "reply"
    early.writer.write(LARGE[2_000:])
    assert (await next_answer(early))["code"] == "bad_frame"

    for writer in (wire.writer, early.writer, *(writer for _, writer in held)):
        writer.transport.abort()
    await until(lambda: len(sockets) == 0)
    assert_nothing_is_kept(sockets)


async def test_unauthenticated_websockets_are_evicted_for_users(alone: World) -> None:
    """They never authenticate, or stay open after their token was refused."""
    sockets = alone.workers[0].app.sockets
    ada = await alone.user("Ada")
    wire = await shake(alone, ada)
    sockets._most = 20  # noqa: SLF001
    silent = [await shake(alone, None, f"127.0.1.{1 + number}") for number in range(9)]
    refused = [await shake(alone, None, f"127.0.2.{1 + number}") for number in range(10)]
    for one in refused:
        one.writer.write(frame(encode(Authenticate(token="nobody's"))))
        assert await one.closed() == CloseCode.UNAUTHENTICATED
    others = [await shake(alone, ada) for _ in range(19)]
    assert sockets.shed == 19
    # Authenticated connections are not evicted.
    full = await dial(alone, "127.0.1.1")
    assert (await received(full[0])).startswith(b"HTTP/1.1 503")
    for one in (wire, others[0]):
        one.writer.write(PING)
        assert (await next_answer(one))["type"] == "reply"
    for writer in (full[1], *(one.writer for one in (wire, *others, *silent, *refused))):
        writer.transport.abort()
    await until(lambda: len(sockets) == 0)
    assert_nothing_is_kept(sockets)
