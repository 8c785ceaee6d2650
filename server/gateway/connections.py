"""All connections of a worker: how many each user may have, their heartbeats, and their end when it drains."""

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
"""A heartbeat's period is cut into this many turns, each of which takes its share of the connections."""
DRAIN_BATCH_SECONDS = 0.1
DRAIN_BATCHES = 20
"""Clients are sent away in this many batches, so that they do not all come back in one instant."""
DRAIN_SECONDS = 10.0
RETURNS_PER_SECOND, SPREAD_SECONDS = 500, 10.0
"""Clients are asked to come back at such a rate, which one worker takes in with half of its time to spare
(docs/performance.md, storm), and within so many seconds.
"""


class Connections:
    """Who is connected to this worker."""

    def __init__(
        self,
        hub: Hub,
        *,
        heartbeat_seconds: float,
        alive: Callable[[list[Connection]], None],
        tickets: Callable[[list[Connection]], Awaitable[list[str | None]]],
    ) -> None:
        """`alive` is told, once in each heartbeat, of every connection that is; `tickets` returns one for each of some
        connections, with which to come back.
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
        """Begin the heartbeats."""
        self._beating = asyncio.create_task(every(self._heartbeat_seconds / SLICES, self._beat))

    def add(self, connection: Connection) -> None:
        """Count a connection in."""
        self._slices[self._next].add(connection)
        self._next = (self._next + 1) % SLICES

    def remove(self, connection: Connection) -> None:
        """Count it out."""
        for one in self._slices:
            one.discard(connection)

    async def drain(self, code: CloseCode) -> None:
        """Let every connection finish what it does and send its client elsewhere, batch by batch."""
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
