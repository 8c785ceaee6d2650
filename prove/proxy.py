"""A TCP proxy between the crowd and the server, which can make a network as bad as networks get."""

import asyncio
import socket
from collections.abc import Callable
from typing import Self, cast

BUFFER_BYTES = 8 * 1024
"""What a kernel may take from the server for a client that does not read: little, so that the server notices."""


CUT_SECONDS = 0.01


class Pipe:
    """One client's connection: its two sides, and what is wrong with it."""

    def __init__(self) -> None:
        self.sides: list[Side] = []
        self.delay = 0.0
        """Seconds that everything takes longer, in both directions."""
        self.bytes_per_second = 0.0
        """How fast the server's words come through; 0 is at once."""
        self.is_black_hole = False
        """Nothing comes through any more, in either direction, and nobody is told."""
        self.is_cut_short = False
        """What comes next comes half, and that is the end."""
        self._is_ending = False

    def take(self, side: "Side", data: bytes) -> None:
        """Carry what came from one side to the other."""
        other = self.sides[1 - self.sides.index(side)]
        loop = asyncio.get_running_loop()
        if self.is_black_hole or self._is_ending:
            return
        if self.is_cut_short:
            self._is_ending = True
            data = data[: len(data) // 2]
            # After what is on its way: a network loses what comes last, and never turns it around.
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
        """End it without a word."""
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
        """Say what was said before there was a connection."""
        self._transport = cast(asyncio.Transport, transport)
        for data in self._early:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Carry it over."""
        self._pipe.take(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side too, after what is on its way, unless nothing gets through."""
        del exc
        self._gone(self._pipe)
        if not self._pipe.is_black_hole:
            for side in self._pipe.sides:
                if side is not self:
                    asyncio.get_running_loop().call_later(self._pipe.delay, side.close)

    def write(self, data: bytes) -> None:
        """Say something to whoever is at this end."""
        if self._transport is None:
            self._early.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """End in good order."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
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
        """What new connections are delayed by."""

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
