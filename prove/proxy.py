"""A TCP proxy between the crowd and the server, which simulates a bad network."""

import asyncio
import socket
from collections.abc import Callable
from typing import Self, cast

BUFFER_BYTES = 8 * 1024
"""Receive buffer toward the server, in bytes. It is small, so that the server notices a client that does not read."""
CUT_SECONDS = 0.01
"""Delay between the last data of a connection and its abort, in seconds."""


class Pipe:
    """One client's connection, with its two sides and its simulated defects."""

    def __init__(self) -> None:
        self.sides: list[Side] = []
        self.delay = 0.0
        """Added latency in each direction, in seconds."""
        self.bytes_per_second = 0.0
        """Bandwidth from the server to the client; 0 means no limit."""
        self.is_black_hole = False
        """Whether all data in both directions is dropped, without closing the connection."""
        self.is_cut_short = False
        """Whether the next data is truncated to half, and the connection aborted after it."""
        self._is_ending = False

    def forward(self, side: "Side", data: bytes) -> None:
        """Forward data from one side to the other."""
        other = self.sides[1 - self.sides.index(side)]
        loop = asyncio.get_running_loop()
        if self.is_black_hole or self._is_ending:
            return
        if self.is_cut_short:
            self._is_ending = True
            data = data[: len(data) // 2]
            # After delayed data has arrived, because TCP never reorders.
            loop.call_later(self.delay + CUT_SECONDS, self.cut)
        if self.bytes_per_second and side is self.sides[1]:
            side.pause()
            loop.call_later(len(data) / self.bytes_per_second, side.resume)
            other.write(data)
        elif self.delay:
            loop.call_later(self.delay, other.write, data)
        else:
            other.write(data)

    def cut(self) -> None:
        """Abort the connection on both sides."""
        for side in self.sides:
            side.abort()


class Side(asyncio.Protocol):
    """One end of a pipe."""

    def __init__(self, pipe: Pipe, gone: Callable[[Pipe], None]) -> None:
        self._pipe = pipe
        self._gone = gone
        self._early: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        pipe.sides.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Write data that arrived before the connection was open."""
        self._transport = cast(asyncio.Transport, transport)
        for data in self._early:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Forward the data."""
        self._pipe.forward(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side too, after delayed data, unless the pipe is a black hole."""
        del exc
        self._gone(self._pipe)
        if not self._pipe.is_black_hole:
            for side in self._pipe.sides:
                if side is not self:
                    asyncio.get_running_loop().call_later(self._pipe.delay, side.close)

    def write(self, data: bytes) -> None:
        """Write data to the peer, or buffer it until the connection is open."""
        if self._transport is None:
            self._early.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close after all data was written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close immediately, without writing buffered data."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stop reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class Proxy:
    """Listens on loopback and connects to a server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._server: asyncio.Server
        self._connecting: set[asyncio.Task[None]] = set()
        self.pipes: set[Pipe] = set()
        self.delay = 0.0
        """The delay of new connections, in seconds."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pipe in list(self.pipes):
            pipe.cut()

    def _accept(self) -> Side:
        pipe = Pipe()
        pipe.delay = self.delay
        self.pipes.add(pipe)
        client = Side(pipe, self.pipes.discard)
        server = Side(pipe, self.pipes.discard)
        task = asyncio.create_task(self._connect(pipe, server))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return client

    async def _connect(self, pipe: Pipe, server: Side) -> None:
        upstream = socket.socket()
        upstream.settimeout(0)
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(upstream, self._address)
            await loop.create_connection(lambda: server, sock=upstream)
        except OSError:
            upstream.close()
            self.pipes.discard(pipe)
            pipe.cut()
