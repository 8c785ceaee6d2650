"""All connections of a worker: their heartbeats, and their end when the worker drains."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from protocol.codec import encode, now, text_frame
from protocol.errors import CloseCode
from protocol.server import GoingAway, Heartbeat
from server.core.periodic import end, every
from server.gateway.connection import Connection
from server.gateway.websocket import PING
from server.hub.hub import Hub

log = logging.getLogger(__name__)

SLICES = 30
"""Number of parts of a heartbeat interval. In each part, the same share of the connections gets a heartbeat."""
DRAIN_BATCH_SECONDS = 0.1
"""Pause between two batches, in seconds."""
DRAIN_BATCHES = 20
"""Number of batches in which a draining worker closes its connections, so that not all clients reconnect together."""
DRAIN_SECONDS = 10.0
"""Max wait for the last connections to end, in seconds."""
RETURNS_PER_SECOND, SPREAD_SECONDS = 500, 10.0
"""Rate at which clients are asked to reconnect, and max spread of the times in seconds. One worker admits that rate in
half of its time (docs/performance.md, storm).
"""


class Connections:
    """The connections of this worker."""

    def __init__(
        self,
        hub: Hub,
        *,
        heartbeat_seconds: float,
        alive: Callable[[list[Connection]], None],
        tickets: Callable[[list[Connection]], Awaitable[list[str | None]]],
    ) -> None:
        """`alive` is called in each heartbeat with all connections that are alive. `tickets` returns a ticket per
        connection, with which its client may reconnect.
        """
        self._hub = hub
        self._tickets = tickets
        self._heartbeat_seconds = heartbeat_seconds
        self._alive = alive
        self._slices: list[set[Connection]] = [set() for _ in range(SLICES)]
        self._next = 0
        self._turn = 0
        self._beating: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(len(one) for one in self._slices)

    def start(self) -> None:
        """Start the heartbeats."""
        self._beating = asyncio.create_task(every(self._heartbeat_seconds / SLICES, self._beat))

    def add(self, connection: Connection) -> None:
        """Add a connection."""
        self._slices[self._next].add(connection)
        self._next = (self._next + 1) % SLICES

    def remove(self, connection: Connection) -> None:
        """Remove a connection."""
        for one in self._slices:
            one.discard(connection)

    async def drain(self, code: CloseCode) -> None:
        """Let every connection finish its current frame, and ask its client to reconnect, batch by batch."""
        if self._beating is not None:
            await end([self._beating])
        everyone = [connection for one in self._slices for connection in one]
        size = max(1, -(-len(everyone) // DRAIN_BATCHES))
        spread = min(SPREAD_SECONDS, len(everyone) / RETURNS_PER_SECOND)
        for start in range(0, len(everyone), size):
            batch = everyone[start : start + size]
            tickets = await self._tickets(batch)
            for connection, ticket in zip(batch, tickets, strict=True):
                after = random.uniform(0, spread)  # noqa: S311 - it need not be secret
                connection.finish(GoingAway(reconnect_after_ms=int(after * 1000), ticket=ticket), code)
            await asyncio.sleep(DRAIN_BATCH_SECONDS if len(everyone) > size else 0)
        deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while len(self) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - the end of many
            await asyncio.sleep(DRAIN_BATCH_SECONDS)

    async def _beat(self) -> None:
        self._turn = (self._turn + 1) % SLICES
        if self._slices[self._turn]:
            self._beat_slice(list(self._slices[self._turn]), asyncio.get_running_loop().time())

    def _beat_slice(self, connections: list[Connection], at: float) -> None:
        server_time = now()
        plain = PING + text_frame(encode(Heartbeat(server_time=server_time)))
        for connection in connections:
            if connection.socket.heard_at < at - 2 * self._heartbeat_seconds:
                connection.close(CloseCode.SILENT)
                continue
            recent = self._hub.topics.recent(connection.attached, since=at - self._heartbeat_seconds)
            if recent:
                connection.write(PING + text_frame(encode(Heartbeat(server_time=server_time, versions=recent))))
            else:
                connection.write(plain)
        self._alive(connections)
