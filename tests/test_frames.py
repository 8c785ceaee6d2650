"""WebSocket frames that arrive in parts, several in one read, fragmented, or with pings in between."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from websockets.frames import Frame, Opcode

from protocol import SUBPROTOCOL
from protocol.limits import MAX_FRAME_BYTES
from tests.world import UserSession, World

PATIENCE = 10.0


class Wire:
    """A WebSocket without a client library, to control the bytes on the wire."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, world: World, who: UserSession) -> "Wire":
        host, _, port = world.url.removeprefix("http://").rpartition(":")
        wire = cls(*await asyncio.open_connection(host, int(port)))
        wire.writer.write(
            f"GET /v1/ws?resume=1 HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nAuthorization: Bearer {who.token}\r\n\r\n".encode()
        )
        assert b" 101 " in await wire.reader.readuntil(b"\r\n\r\n")
        assert (await wire.hear())["type"] == "ready"
        return wire

    async def frame(self) -> tuple[int, bytes]:
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readexactly(2)
            size = head[1]
            if size >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8))
            return head[0] & 0xF, await self.reader.readexactly(size)

    async def hear(self) -> dict[str, object]:
        while (got := await self.frame())[0] == Opcode.PING:
            pass  # a heartbeat, which may come before `ready`
        kind, payload = got
        assert kind == Opcode.TEXT, (kind, payload)
        return msgspec.json.decode(payload, type=dict[str, object])

    async def closed(self) -> int:
        while (frame := await self.frame())[0] != Opcode.CLOSE:
            pass
        return int.from_bytes(frame[1][:2])


def frame(payload: bytes, opcode: Opcode = Opcode.TEXT, *, fin: bool = True, mask: bool = True) -> bytes:
    return Frame(opcode, payload, fin).serialize(mask=mask)


def pings(rng: random.Random, count: int) -> Iterator[bytes]:
    """Yield the frames of `count` pings, some long, some fragmented, some with control frames in between."""
    for number in range(count):
        payload = msgspec.json.encode({"type": "ping", "id": number}) + b" " * rng.choice((0, 0, 200, 70_000))
        if rng.random() < 0.3:
            cut = rng.randrange(len(payload))
            yield frame(payload[:cut], fin=False)
            if rng.random() < 0.5:
                yield frame(b"still there?", Opcode.PING)
            yield frame(payload[cut:], Opcode.CONT)
        else:
            yield frame(payload)
        if rng.random() < 0.2:
            yield frame(b"", Opcode.PONG)


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Wire]:
    (ada,) = await world.users("Ada")
    wire = await Wire.open(world, ada)
    yield wire
    wire.writer.transport.abort()


@pytest.mark.parametrize("seed", range(4))
async def test_frames_may_arrive_in_any_parts(wire: Wire, seed: int) -> None:
    rng = random.Random(seed)
    count = 25
    data = b"".join(pings(rng, count))
    start = 0
    while start < len(data):
        end = start + rng.choice((1, 2, 3, 5, 30, 1_000, 50_000, 200_000))
        wire.writer.write(data[start:end])
        await wire.writer.drain()
        # Let the server read from time to time, so that parts arrive separately.
        await asyncio.sleep(0)
        start = end
    answered: list[object] = []
    while len(answered) < count:
        kind, payload = await wire.frame()
        if kind == Opcode.TEXT:
            answered.append(msgspec.json.decode(payload)["re"])
        else:
            assert (kind, payload) == (Opcode.PONG, b"still there?")
    assert answered == list(range(count))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"{}", mask=False), 1002),
        (frame(b" " * (MAX_FRAME_BYTES + 1)), 1009),
        (b"\x81\xff" + (MAX_FRAME_BYTES + 1).to_bytes(8), 1009),
        (frame(b"{", fin=False) + frame(b"{}"), 1002),
        (frame(b"}", Opcode.CONT), 1002),
        (b"\xc1" + frame(b"{}")[1:], 1002),
        (frame(b"", Opcode.CLOSE), 1005),
    ],
    ids=[
        "unmasked",
        "too big",
        "too big by its header",
        "text within a message",
        "continuation without a message",
        "reserved bits",
        "close",
    ],
)
async def test_invalid_frames_close_the_connection(wire: Wire, data: bytes, code: int) -> None:
    wire.writer.write(data)
    assert await wire.closed() == (code if code != 1005 else 0)
