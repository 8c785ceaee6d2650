"""The bus between workers by Redis or Valkey pub/sub.

One connection listens and one publishes. What is published in one turn of the loop travels together: one
message for each channel, all of them in one pipeline. While the server cannot be reached, publishing does
nothing, `is_up` says so, and whoever follows a channel has to look for news elsewhere.
"""

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError

from server.errors import Fatal
from server.periodic import every

CONNECT_SECONDS = 2.0
PING_SECONDS = 0.5
"""How often the listening connection is asked for a sign of life; two without one, and it is down."""
REPLY_SECONDS = 2.0
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0)
SUBSCRIBE_AT_ONCE = 500
ORIGIN_BYTES = 8
MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""How much may wait for a publisher that is slow; what is more is dropped and found in PostgreSQL."""

_LOST = (RedisError, OSError, asyncio.TimeoutError)
log = logging.getLogger(__name__)


class RedisBus:
    """This worker's two connections to Redis."""

    def __init__(self, url: str, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]) -> None:
        """`deliver` takes a channel and what another worker said in it; `caught_up` is called when it is up (again)."""
        self._pool = ConnectionPool.from_url(
            url, protocol=2, socket_timeout=REPLY_SECONDS, socket_connect_timeout=CONNECT_SECONDS, retry=None
        )
        self._deliver = deliver
        self._caught_up = caught_up
        self._channels: set[bytes] = set()
        self._confirming: dict[bytes, asyncio.Future[None]] = {}
        self._commands: list[tuple[bytes, bytes]] = []
        # Who says it comes first in every message: this worker has heard its own already.
        self._origin = os.urandom(ORIGIN_BYTES)
        self._queue: dict[bytes, list[bytes]] = {}
        self._queued_bytes = 0
        self._listening: AbstractConnection | None = None
        self._publisher: asyncio.Task[None] | None = None
        self._publishing: AbstractConnection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = 0.0
        self._was_lost = False
        self.is_up = False
        self.published = 0
        self.received = 0
        self.dropped = 0

    async def start(self) -> None:
        """Connect. Raises Fatal if the server cannot be reached: a start is when that is a mistake."""
        try:
            self._listening = await self._connect()
        except _LOST as error:
            raise Fatal(f"Redis cannot be reached: {str(error).rstrip('.')}. Check REDIS_URL.") from error
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(every(PING_SECONDS, self._watch))]

    async def close(self) -> None:
        """Disconnect."""
        for task in [*self._tasks, *([self._publisher] if self._publisher else [])]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for connection in (self._listening, self._publishing):
            if connection is not None:
                await connection.disconnect(nowait=True)

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Listen to channels, and return when that is confirmed; at once while the bus is down."""
        new = [channel for channel in channels if channel not in self._channels]
        self._channels.update(new)
        if self.is_up:
            for channel in new:
                self._confirming[channel] = asyncio.get_running_loop().create_future()
                self._command(b"SUBSCRIBE", channel)
        waiting = [self._confirming[channel] for channel in channels if channel in self._confirming]
        if waiting:
            await asyncio.wait(waiting)

    def unsubscribe(self, channel: bytes) -> None:
        """Listen to a channel no more."""
        self._channels.discard(channel)
        if self.is_up:
            self._command(b"UNSUBSCRIBE", channel)

    def publish(self, channel: bytes, words: bytes) -> None:
        """Say `words` in a channel, together with what else is said in this turn of the loop."""
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self.dropped += 1
            return
        self._queue.setdefault(channel, []).append(words)
        self._queued_bytes += len(words)
        if self._publisher is None:
            self._publisher = asyncio.create_task(self._publish())

    async def _connect(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    # ---------------------------------------------------------------------------------------------- publishing

    async def _publish(self) -> None:
        # A task begins in the next turn of the loop: what else is published in this one is in the queue by then.
        try:
            while self._queue:
                queue, self._queue, self._queued_bytes = self._queue, {}, 0
                try:
                    await asyncio.wait_for(self._send(queue), REPLY_SECONDS)
                except _LOST:
                    self.dropped += len(queue)
                    if self._publishing is not None:
                        await self._publishing.disconnect(nowait=True)
                        self._publishing = None
        finally:
            self._publisher = None

    async def _send(self, queue: dict[bytes, list[bytes]]) -> None:
        if self._publishing is None:
            if not self.is_up:
                # The listener is already trying to reconnect: do not make everyone wait for the same.
                raise ConnectionError
            self._publishing = await self._connect()
        connection = self._publishing
        commands = [(b"PUBLISH", channel, b"".join((self._origin, *words))) for channel, words in queue.items()]
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        for _ in commands:
            await connection.read_response(timeout=math.inf)
        self.published += len(commands)

    # ----------------------------------------------------------------------------------------------- listening

    def _command(self, verb: bytes, channel: bytes) -> None:
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush_commands)
        self._commands.append((verb, channel))

    def _flush_commands(self) -> None:
        commands, self._commands = self._commands, []
        if self._listening is None or not self.is_up:
            return
        # Neighbours of the same kind travel in one command; the order between kinds stays.
        groups: list[list[bytes]] = []
        for verb, channel in commands:
            if not groups or groups[-1][0] != verb or len(groups[-1]) > SUBSCRIBE_AT_ONCE:
                groups.append([verb])
            groups[-1].append(channel)
        self._write(groups)

    def _write(self, commands: list[list[bytes]]) -> None:
        assert self._listening is not None  # noqa: S101 - called while connected
        writer = self._listening._writer  # noqa: SLF001 - the public way to send waits, and may not run twice at once
        if writer is not None:
            writer.writelines(self._listening.pack_commands(commands))

    async def _listen(self) -> None:
        attempt = 0
        while True:
            try:
                if self._listening is None:
                    self._listening = await self._connect()
                attempt = 0
                await self._hear(self._listening)
            except Exception as error:  # noqa: BLE001 - whatever it is, without listening there is no bus
                if self.is_up:
                    log.warning("the bus is down: %s", error)
                self._was_lost = True
                await self._go_down()
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1

    async def _hear(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        asked: set[bytes] = set()
        unconfirmed = self._ask_for(self._channels, asked)
        self._write([[b"PING"]])
        while True:
            kind, *rest = await connection.read_response(disable_decoding=True, timeout=math.inf)
            self._heard_at = loop.time()
            if kind == b"message":
                self.received += 1
                if not rest[1].startswith(self._origin):
                    self._deliver(rest[0], rest[1][ORIGIN_BYTES:])
            elif kind == b"subscribe":
                unconfirmed.discard(rest[0])
                if (confirmed := self._confirming.pop(rest[0], None)) is not None:
                    confirmed.set_result(None)
            if not self.is_up and not unconfirmed:
                # What was added while the others were being confirmed comes next; then it is all there.
                unconfirmed = self._ask_for(self._channels - asked, asked)
                if not unconfirmed:
                    self.is_up = True
                    if self._was_lost:
                        log.info("the bus is up again")
                    self._caught_up()

    def _ask_for(self, channels: Iterable[bytes], asked: set[bytes]) -> set[bytes]:
        new = sorted(channels)
        asked.update(new)
        starts = range(0, len(new), SUBSCRIBE_AT_ONCE)
        self._write([[b"SUBSCRIBE", *new[start : start + SUBSCRIBE_AT_ONCE]] for start in starts])
        return set(new)

    async def _watch(self) -> None:
        if self._listening is None or not self._listening.is_connected:
            return
        if asyncio.get_running_loop().time() - self._heard_at > 2 * PING_SECONDS:
            # Not a clean end: a server that hangs, a network that swallows. Reading it will now fail.
            await self._listening.disconnect(nowait=True)
        else:
            self._write([[b"PING"]])

    async def _go_down(self) -> None:
        self.is_up = False
        if self._listening is not None:
            await self._listening.disconnect(nowait=True)
            self._listening = None
        # Those who wait go on: they look into PostgreSQL, and will again when the bus is up.
        for waiting in self._confirming.values():
            waiting.set_result(None)
        self._confirming.clear()
