"""A WebSocket proxy that changes the frames of a correct server, to simulate a faulty one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from protocol.codec import text_frame

Spoil = Callable[[bytes], list[bytes]]
"""Returns the frames to send in place of a frame: none, the same one, or others."""

PLAIN = 126
MASKED = 0x80


class Relay:
    """Relays frames one by one. `down` returns the `Spoil` of one connection, for frames of the server. `up` receives
    the payload of a client's frame. It returns a reply to send instead of the server's, or None to relay the frame.
    """

    def __init__(
        self, port: int, down: Callable[[], Spoil], up: Callable[[bytes], bytes | None] = lambda _: None
    ) -> None:
        self._port = port
        self._down_of_one = down
        self._answer = up

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        upwards = asyncio.create_task(self._up(reader, writer, forth))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._down(back, writer)
        upwards.cancel()
        writer.close()
        forth.close()

    async def _up(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forth: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            forth.write(head)
            if b"upgrade: websocket" not in head.lower():
                while data := await reader.read(65536):
                    forth.write(data)
            while True:
                frame, payload = await frame_of(reader)
                if (answer := self._answer(payload)) is None:
                    forth.write(frame)
                else:
                    writer.write(text_frame(answer))
        forth.close()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        if b" 101 " not in head:
            while data := await reader.read(65536):
                writer.write(data)
            return
        spoil = self._down_of_one()
        while True:
            frame, payload = await frame_of(reader)
            is_text = frame[0] & 0xF == 1
            for one in spoil(payload) if is_text else []:
                writer.write(text_frame(one))
            if not is_text:
                writer.write(frame)


async def frame_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the next WebSocket frame and its unmasked payload."""
    frame = await reader.readexactly(2)
    is_masked, size = frame[1] & MASKED, frame[1] & ~MASKED
    if size >= PLAIN:
        more = await reader.readexactly(2 if size == PLAIN else 8)
        frame, size = frame + more, int.from_bytes(more)
    mask = await reader.readexactly(4) if is_masked else bytes(4)
    data = await reader.readexactly(size)
    payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(data)) if is_masked else data
    return frame + (mask if is_masked else b"") + data, payload
