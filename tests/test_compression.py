"""Large frames and answers are compressed for clients that accept it, and clients may compress their frames."""

import contextlib
import gzip
import random
import zlib
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.typing import Subprotocol

from protocol import SUBPROTOCOL
from protocol.client import Send
from protocol.codec import encode, text_frame
from protocol.ids import MessageId, uuid7
from protocol.limits import MAX_FRAME_BYTES
from server.core.config import Settings
from server.gateway import compression
from server.gateway.compression import MIN_BYTES, compressed_frame, inflated
from tests.world import Room, UserSession, World, http_client, sent

TEXT = "A sentence with an id of this conversation, and another one. "


async def opened(
    world: World, who: UserSession | None, *, compression: str | None = "deflate", server_max_window_bits: int = 0
) -> ClientConnection:
    return await connect(
        world.url.replace("http", "ws", 1) + "/v1/ws",
        additional_headers={} if who is None else {"Authorization": f"Bearer {who.token}"},
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        max_size=None,
        compression=compression,
        extensions=[ClientPerMessageDeflateFactory(server_max_window_bits=server_max_window_bits)]
        if server_max_window_bits
        else None,
    )


async def until_type(socket: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        frame: dict[str, Any] = msgspec.json.decode(await socket.recv())
        if frame["type"] == kind:
            return frame


async def until_closed(socket: ClientConnection) -> int | None:
    """Return the close code of the server."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await socket.recv()
    return socket.close_code


class Wire:
    """Counts the bytes that arrive at a client."""

    def __init__(self, socket: ClientConnection) -> None:
        self.count = 0
        receive = socket.protocol.receive_data

        def counted(data: bytes) -> None:
            self.count += len(data)
            receive(data)

        socket.protocol.receive_data = counted  # type: ignore[assignment, method-assign]


@pytest.fixture
async def stored(room: Room) -> Room:
    for number in range(30):
        await sent(room.ada, room.group, f"{number}: {TEXT * 10}")
    return room


@pytest.mark.parametrize("is_accepted", [True, False])
async def test_large_frames_are_compressed_if_the_client_accepts_it(
    stored: Room, world: World, *, is_accepted: bool
) -> None:
    socket = await opened(world, stored.users[0], compression="deflate" if is_accepted else None)
    offered = socket.response.headers.get("Sec-WebSocket-Extensions", "") if socket.response else ""
    assert ("server_no_context_takeover" in offered, "client_no_context_takeover" in offered) == (is_accepted,) * 2
    await until_type(socket, "conversations")
    wire = Wire(socket)
    await socket.send(f'{{"type": "history", "id": 1, "conversation_id": "{stored.group}"}}')
    reply = await until_type(socket, "reply")
    size = len(encode(reply))
    assert len(reply["result"]["messages"]) == 20
    assert wire.count < size / 5 if is_accepted else wire.count > 0.9 * size
    await socket.close()


@pytest.mark.parametrize("bits", [8, 9, 12])
async def test_clients_with_a_small_window_can_decompress_large_frames(room: Room, world: World, bits: int) -> None:
    """zlib cannot compress with 8 bits, so the server does not accept that offer."""
    text = random.Random(bits).randbytes(1_900).hex()
    for _ in range(20):
        await sent(room.ada, room.group, text)
    socket = await opened(world, room.users[0], compression=None, server_max_window_bits=bits)
    answer = socket.response.headers.get("Sec-WebSocket-Extensions", "") if socket.response else ""
    assert (f"server_max_window_bits={bits}" in answer) is (bits > 8)
    await socket.send(f'{{"type": "history", "id": 1, "conversation_id": "{room.group}"}}')
    assert [one["content"] for one in (await until_type(socket, "reply"))["result"]["messages"]] == [text] * 20
    await socket.close()


async def test_compressed_frames_of_clients_are_handled_in_one_piece_and_in_fragments(room: Room, world: World) -> None:
    socket = await opened(world, room.users[0])
    ids = [MessageId(uuid7()) for _ in range(4)]
    frames = [encode(Send(conversation_id=room.group, message_id=one, content=TEXT, id=1)).decode() for one in ids[:3]]
    for frame in frames:
        await socket.send(frame)
        assert (await until_type(socket, "reply"))["result"]["type"] == "sent"
    whole = encode(Send(conversation_id=room.group, message_id=ids[3], content=TEXT, id=2)).decode()
    await socket.send([whole[:50], whole[50:]])
    assert (await until_type(socket, "reply"))["re"] == 2
    await socket.close()
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE id = ANY($1)", ids) == 4


@pytest.mark.parametrize("is_early", [True, False])
async def test_message_that_is_too_long_when_decompressed_closes_the_connection(
    room: Room, world: World, *, is_early: bool
) -> None:
    """20 MB of spaces are 20 KB compressed."""
    socket = await opened(world, None if is_early else room.users[0])
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflate.compress(b" " * 1_000_000) for _ in range(20)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < MAX_FRAME_BYTES
    socket.transport.write(masked(bomb[:-4]))
    assert await until_closed(socket) == 1009
    assert inflated(bomb[:-4], MAX_FRAME_BYTES) is None


async def test_frames_that_cannot_be_decompressed_or_were_not_agreed_close_the_connection(
    room: Room, world: World
) -> None:
    for compressed in ("deflate", None):
        socket = await opened(world, room.users[0], compression=compressed)
        socket.transport.write(masked(b"\xff\xff no deflate"))
        assert await until_closed(socket) == 1002


def masked(payload: bytes) -> bytes:
    """Return a compressed text frame of a client, with a mask of zeros."""
    frame = text_frame(payload, is_compressed=True)
    header = frame[: len(frame) - len(payload)]
    return header[:1] + bytes((header[1] | 0x80,)) + header[2:] + bytes(4) + payload


async def test_answers_are_compressed_if_the_client_accepts_it_and_they_have_no_token(
    stored: Room, world: World
) -> None:
    history = f'{{"type": "history", "conversation_id": "{stored.group}"}}'
    headers = {"Authorization": f"Bearer {stored.users[0].token}"}
    async with http_client(world.url) as http:
        for accepted, is_compressed in (("br, gzip", True), ("gzip;q=0", False), ("identity", False), ("*", False)):
            async with http.stream(
                "POST", "/v1/call", content=history, headers=headers | {"Accept-Encoding": accepted}
            ) as answer:
                raw = b"".join([part async for part in answer.aiter_raw()])
            assert (answer.headers.get("content-encoding") == "gzip") is is_compressed
            assert answer.headers["vary"] == "accept-encoding"
            assert int(answer.headers["content-length"]) == len(raw)
            text = gzip.decompress(raw) if is_compressed else raw
            assert len(msgspec.json.decode(text)["result"]["messages"]) == 20
        ping = await http.post("/v1/call", content='{"type": "ping"}', headers=headers)
        assert "content-encoding" not in ping.headers, "small answers stay as they are"
        described = await http.get("/v1/openapi.json")
        assert described.headers["content-encoding"] == "gzip"
        await world.db.execute("UPDATE session SET user_agent = repeat('x', 5000)")
        sessions = await http.get("/v1/auth/sessions", headers=headers)
        assert len(sessions.content) > MIN_BYTES
        assert "content-encoding" not in sessions.headers, "answers about credentials are not compressed"


async def test_documents_are_compressed_once(world: World) -> None:
    """Otherwise each request of a stranger would cost a millisecond. Their length is not secret."""
    async with http_client(world.url) as http:
        for path in ("/v1/openapi.json", "/v1/asyncapi.json"):
            lengths = {(await http.get(path)).headers["content-length"] for _ in range(10)}
            assert len(lengths) == 1


async def test_nothing_is_compressed_if_the_operator_turns_it_off(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, compression=False), workers=1) as world:
        socket = await opened(world, await world.user("Ada"))
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers
        await socket.close()
        async with http_client(world.url) as http:
            assert "content-encoding" not in (await http.get("/v1/openapi.json")).headers


def test_frames_of_any_content_come_back_and_have_a_random_length() -> None:
    rng = random.Random(1)
    for size, window_bits in ((0, 15), (MIN_BYTES - 1, 15), (MIN_BYTES, 9), (70_000, 15)):
        payload = rng.randbytes(size)
        frame = compressed_frame(payload, window_bits)
        if size < MIN_BYTES:
            assert frame == text_frame(payload)
        else:
            header = 4 if len(frame) < 65_540 else 10
            assert inflated(frame[header:], size) == payload
            assert inflated(frame[header:], size - 1) is None
    text = str([uuid4() for _ in range(100)]).encode()
    assert len({len(compressed_frame(text, zlib.MAX_WBITS)) for _ in range(500)}) == compression.MAX_PADDING + 1
