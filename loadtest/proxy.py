"""A proxy that simulates a distant or bad network, between a crowd and its server or a server and PostgreSQL."""

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self, TypeAlias, cast

Address: TypeAlias = tuple[str, int] | Path
"""A host and a TCP port, or the path of a Unix socket."""
LOOPBACK = ("127.0.0.1", 0)
"""Any free port of this machine."""
CUT_SECONDS = 0.01
"""Delay between the last data of a connection and its abort, in seconds."""


class Pipe:
    """One client's connection, with its two sides and its simulated defects."""

    def __init__(self) -> None:
        self.sides: list[Side] = []
        self.delay = 0.0
        """Added latency in each direction, in seconds. A change keeps the order of data."""
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
        else:
            other.deliver(data, self.delay)

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
        self._delayed: deque[tuple[float, bytes | None]] = deque()
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
                    side.deliver(None, self._pipe.delay)

    def deliver(self, data: bytes | None, delay: float) -> None:
        """Write data to the peer after `delay` seconds and after all earlier data. None closes the connection."""
        if not delay and not self._delayed:
            self._pass(data)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        if self._delayed:
            due = max(due, self._delayed[-1][0])
        else:
            loop.call_at(due, self._pass_due)
        self._delayed.append((due, data))

    def _pass_due(self) -> None:
        loop = asyncio.get_running_loop()
        while self._delayed and self._delayed[0][0] <= loop.time():
            self._pass(self._delayed.popleft()[1])
        if self._delayed:
            loop.call_at(self._delayed[0][0], self._pass_due)

    def _pass(self, data: bytes | None) -> None:
        if data is None:
            self.close()
        else:
            self.write(data)

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
    """Listens on loopback or on a Unix socket, and connects to a server."""

    def __init__(self, upstream: Address, *, listen: Address = LOOPBACK, receive_bytes: int = 0) -> None:
        """`receive_bytes` is the size of the receive buffer toward the server; 0 means the system's default."""
        self._upstream = upstream
        self._listen = listen
        self._receive_bytes = receive_bytes
        self._server: asyncio.Server
        self._connecting: set[asyncio.Task[None]] = set()
        self.pipes: set[Pipe] = set()
        self._delay = 0.0

    @property
    def delay(self) -> float:
        """Added latency in each direction, in seconds, of open and new connections."""
        return self._delay

    @delay.setter
    def delay(self, seconds: float) -> None:
        self._delay = seconds
        for pipe in self.pipes:
            pipe.delay = seconds

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if isinstance(self._listen, Path):
            self._server = await loop.create_unix_server(self._accept, str(self._listen))
        else:
            self._server = await loop.create_server(self._accept, *self._listen)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pipe in list(self.pipes):
            pipe.cut()

    @property
    def url(self) -> str:
        """The proxy's URL, if it listens on TCP."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self) -> Side:
        pipe = Pipe()
        pipe.delay = self._delay
        self.pipes.add(pipe)
        client = Side(pipe, self.pipes.discard)
        server = Side(pipe, self.pipes.discard)
        task = asyncio.create_task(self._connect(pipe, server))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return client

    async def _connect(self, pipe: Pipe, server: Side) -> None:
        loop = asyncio.get_running_loop()
        address: str | tuple[str, int]
        connect: Callable[..., Awaitable[object]]
        if isinstance(self._upstream, Path):
            family, address, connect = socket.AF_UNIX, str(self._upstream), loop.create_unix_connection
        else:
            family, address, connect = socket.AF_INET, self._upstream, loop.create_connection
        upstream = socket.socket(family)
        upstream.settimeout(0)
        if self._receive_bytes:
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        try:
            await loop.sock_connect(upstream, address)
            await connect(lambda: server, sock=upstream)
        except OSError:
            upstream.close()
            self.pipes.discard(pipe)
            pipe.cut()
