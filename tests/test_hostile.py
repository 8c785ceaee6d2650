"""Arbitrary bytes on a socket: the server responds or closes, keeps running, and leaks nothing."""

import asyncio
import contextlib
import gc
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from websockets.frames import Opcode

from protocol.limits import MAX_FRAME_BYTES
from server.core.config import Settings
from tests.test_frames import Wire
from tests.world import UserSession, World, http_client

PATIENCE = 10.0
TASKS = 46
"""Max tasks of an idle worker and test, which have about 37. Forty leaking examples would exceed it."""


def frame(payload: bytes, opcode: int = Opcode.TEXT, *, fin: bool = True, mask: bool = True) -> bytes:
    """Return a WebSocket frame, valid or not, masked with zeros."""
    head = bytes((0x80 * fin | opcode,))
    size = len(payload)
    if size < 126:
        head += bytes((0x80 * mask | size,))
    elif size < 1 << 16:
        head += bytes((0x80 * mask | 126,)) + size.to_bytes(2)
    else:
        head += bytes((0x80 * mask | 127,)) + size.to_bytes(8)
    return head + bytes(4 * mask) + payload


HEAD = b"GET /v1/ws HTTP/1.1\r\nHost: here\r\n"

raw = st.binary(max_size=300)
texts = st.text(max_size=100).map(str.encode)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
).map(lambda value: repr(value).encode())
frames = st.one_of(
    raw,
    st.builds(frame, texts),
    st.builds(frame, jsons),
    st.builds(frame, raw, st.integers(0, 15), fin=st.booleans(), mask=st.booleans()),
    st.sampled_from(
        [
            frame(b"\xff\xfe not UTF-8"),
            frame(b'{"type":"ping"', fin=False) + frame(b"?", Opcode.PING) + frame(b"}", Opcode.CONT),
            frame(b"x" * 126, Opcode.PING),
            frame(b"\x00", Opcode.CLOSE),
            frame(b"\x03\xe8" + b"\xff" * 10, Opcode.CLOSE),
            b"\xc1\x80\0\0\0\0",
            b"\x81\xff" + b"\xff" * 8,
            b"\x81\xfe\x00\x01\0\0\0\0x",
            frame(b'{"type":"send","conversation_id":"' + b"0" * 2_000 + b'"}'),
            frame(b"[" * 100_000),
            frame(b'{"type":"resume","epoch":"","versions":{' + b'"":0,' * 50 + b'"":0}}'),
        ]
    ),
)


@pytest.fixture
async def worker(settings: Settings) -> AsyncIterator[tuple[World, UserSession]]:
    async with World(settings, workers=1) as world:
        yield world, await world.user("Ada")


async def idle(world: World) -> None:
    """Wait until there are no connections, and no tasks besides those that always run."""
    app = world.workers[0].app
    async with asyncio.timeout(PATIENCE):
        while len(app.connections) or len(asyncio.all_tasks()) > TASKS or len(app.admission):
            await asyncio.sleep(0.01)


@examples(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(frames, min_size=1, max_size=6), cut=st.integers(1, 400))
async def test_server_responds_to_any_frames_or_closes(
    worker: tuple[World, UserSession], pieces: list[bytes], cut: int
) -> None:
    world, ada = worker
    wire = await Wire.open(world, ada)
    data = b"".join(pieces)
    for start in range(0, min(len(data), 20_000), cut):
        wire.writer.write(data[start : start + cut])
    wire.writer.write(data[20_000:])
    wire.writer.write_eof()
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while said := await wire.reader.read(65_536):
                assert b"Traceback" not in said
    wire.writer.close()
    await idle(world)
    async with http_client() as http:
        assert (await http.get(f"{world.url}/healthz")).text == "alive\n"


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.one_of(raw, st.builds(lambda line: HEAD + line, raw), st.builds(lambda t: HEAD + t + b"\r\n\r\n", texts))
)
async def test_server_responds_to_any_bytes_instead_of_a_handshake_or_closes(
    worker: tuple[World, UserSession], head: bytes
) -> None:
    world, _ = worker
    reader, writer = await asyncio.open_connection(*_address(world))
    writer.write(head)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        said = await reader.read()
    assert b"Traceback" not in said
    assert not said or said.startswith(b"HTTP/1.1 4"), said
    writer.close()
    await idle(world)


async def test_arbitrary_bytes_leak_no_objects(worker: tuple[World, UserSession]) -> None:
    """Count objects of each type after hostile connections. One more per connection is a leak.

    A busy machine opens more database connections, which keep statements.
    """
    world, _ = worker
    rng = random.Random(1)
    # One user may not connect this often.
    people = [await world.user("Ada") for _ in range(10)]

    async def garbage(count: int) -> None:
        for number in range(count):
            wire = await Wire.open(world, people[number % len(people)])
            wire.writer.write(frame(rng.randbytes(rng.randrange(200))) + rng.randbytes(rng.randrange(60)))
            wire.writer.write(b"\x81\xfe" + (MAX_FRAME_BYTES // 8).to_bytes(2) + b"\0\0\0\0half of what was promised")
            wire.writer.transport.abort()

    async def kept() -> Counter[type]:
        await idle(world)
        gc.collect()
        return Counter(map(type, gc.get_objects()))

    await garbage(100)
    before = await kept()
    await garbage(400)
    assert {kind: count for kind, count in (await kept() - before).items() if count >= 300} == {}


def _address(world: World) -> tuple[str, int]:
    host, _, port = world.url.removeprefix("http://").rpartition(":")
    return host, int(port)
