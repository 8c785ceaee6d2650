"""The bus between workers by Redis or Valkey pub/sub.

One connection says and hears. redis-py makes it (URL, TLS, authentication); then the bus takes its transport over,
as a WebSocket does (docs/decisions/0004): what is said is written at once, what is heard goes through the parser
straight to whoever listens. While the server cannot be reached, publishing does nothing, `is_up` says so, and
whoever follows a channel has to look for news elsewhere.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool

from server.core.errors import REDIS_LOST, log_failure, redis_unreachable
from server.core.periodic import end, every

CONNECT_SECONDS = 2.0
PING_SECONDS = 0.5
"""How often the server is asked for a sign of life, in seconds."""
MAX_UNANSWERED = 2
"""Pings without an answer after which the server is down. They are counted, since a worker that was held up itself, for
however long, has asked nothing meanwhile.
"""
REPLY_SECONDS = 2.0
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0)
ORIGIN_BYTES = 8
MAX_UNSENT_BYTES = 16 * 1024 * 1024
"""How much may wait for a server that is slow; what is more is dropped and found in PostgreSQL."""

log = logging.getLogger(__name__)


class Verbs(NamedTuple):
    """What the commands and messages of pub/sub are called, and how many channels one command may name."""

    publish: bytes
    subscribe: bytes
    unsubscribe: bytes
    subscribed: bytes
    message: bytes
    channels_at_once: int


PLAIN = Verbs(b"PUBLISH", b"SUBSCRIBE", b"UNSUBSCRIBE", b"subscribe", b"message", 500)
SHARDED = Verbs(b"SPUBLISH", b"SSUBSCRIBE", b"SUNSUBSCRIBE", b"ssubscribe", b"smessage", 1)
"""Those of a cluster: a channel lives in one node, and a command takes channels of one slot."""
PATTERNS = Verbs(b"PUBLISH", b"PSUBSCRIBE", b"PUNSUBSCRIBE", b"psubscribe", b"pmessage", 500)
"""Those of channels that are named by a pattern."""
EVERY = b"*"


class _Ear(asyncio.Protocol):
    """What the server says on one connection."""

    def __init__(self, heard: Callable[[Any], None]) -> None:
        self._parser = hiredis.Reader()
        self._heard = heard
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (said := self._parser.gets()) is not False:
                self._heard(said)
        except Exception as error:  # noqa: BLE001 - whatever it is, this connection is of no use any more
            self.connection_lost(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_exception(exc or ConnectionError("the connection was closed"))


@dataclass(slots=True)
class _Confirmation:
    """What those who subscribe to a channel wait for: the answers to all commands that subscribe to it."""

    done: asyncio.Future[None]
    commands: int = 0


class RedisBus:
    """This worker's connection to a Redis."""

    def __init__(
        self,
        url: str,
        installation: str,
        *,
        deliver: Callable[[bytes, bytes], None],
        caught_up: Callable[[], None],
        verbs: Verbs = PLAIN,
        origin: bytes | None = None,
    ) -> None:
        """`installation` begins the name of each channel on the server: another installation may have the same ids.
        `deliver` takes a channel and what another worker said in it; `caught_up` is called when it is up (again).
        """
        self._pool = ConnectionPool.from_url(
            url, protocol=3, socket_timeout=REPLY_SECONDS, socket_connect_timeout=CONNECT_SECONDS, retry=None
        )
        self._deliver = deliver
        self._caught_up = caught_up
        self._verbs = verbs
        self._prefix = prefix(installation)
        # Who says it comes first in every message: this worker has heard its own already.
        self._origin = origin or os.urandom(ORIGIN_BYTES)
        self._channels: set[bytes] = set()
        self._confirming: dict[bytes, _Confirmation] = {}
        # Of a connection that is not up yet: the channels that were asked for, and those that are not confirmed.
        self._asked: set[bytes] = set()
        self._unconfirmed: set[bytes] = set()
        self._commands: list[tuple[bytes, bytes]] = []
        self._transport: asyncio.WriteTransport | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._ear: _Ear | None = None
        self._was_lost = False
        self.is_up = False
        self.published = 0
        self.received = 0
        self.dropped = 0

    async def start(self) -> None:
        """Connect. Raises Fatal if the server cannot be reached: a start is when that is a mistake."""
        try:
            connection = await self._connect()
        except REDIS_LOST as error:
            raise redis_unreachable(error) from error
        self.begin(connection)

    def begin(self, connection: AbstractConnection | None = None) -> None:
        """Connect as soon as the server can be reached, and stay connected."""
        self._tasks = [
            asyncio.create_task(self._stay(connection)),
            asyncio.create_task(every(PING_SECONDS, self._watch)),
        ]

    async def close(self) -> None:
        """Disconnect."""
        await end(self._tasks)

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Listen to channels, and return when that is confirmed; at once while the bus is down."""
        new = [channel for channel in channels if channel not in self._channels]
        self._channels.update(new)
        if self.is_up:
            for channel in new:
                # It may wait for an earlier answer, of before it was unsubscribed from.
                waiting_for = self._confirming.setdefault(channel, _Confirmation(self._loop.create_future()))
                waiting_for.commands += 1
                self._command(self._verbs.subscribe, channel)
        waiting = [self._confirming[channel].done for channel in channels if channel in self._confirming]
        if waiting:
            await asyncio.wait(waiting)

    def unsubscribe(self, channel: bytes) -> None:
        """Listen to a channel no more."""
        self._channels.discard(channel)
        if self.is_up:
            self._command(self._verbs.unsubscribe, channel)

    def publish(self, channel: bytes, words: bytes) -> None:
        """Say `words` in a channel. The caller sees to it that what is said in one turn of the loop is said at once."""
        if self._transport is None or self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.dropped += 1
            return
        self._transport.write(_pack(self._verbs.publish, self._prefix + channel, self._origin + words))
        self.published += 1

    # --------------------------------------------------------------------------------------------- the connection

    async def _connect(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def _stay(self, connection: AbstractConnection | None) -> None:
        attempt = 0
        while True:
            try:
                connection = connection or await self._connect()
                await self._listen(connection)
            except Exception as error:  # noqa: BLE001 - whatever it is, without a connection there is no bus
                if self.is_up:
                    log_failure(log, "the bus", error)
                    attempt = 0
                self._go_down()
            finally:
                if connection is not None:
                    await connection.disconnect(nowait=True)
            connection = None
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1

    async def _listen(self, connection: AbstractConnection) -> None:
        """Take the connection over, and raise what ends it."""
        ear = self._ear = _Ear(self._hear)
        assert connection._writer is not None  # noqa: S101, SLF001 - it is connected
        self._transport = connection._writer.transport  # noqa: SLF001 - the public way goes through two more layers
        self._transport.set_protocol(ear)
        self._unanswered = 0
        self._asked.clear()
        self._unconfirmed.clear()
        self._ask_for(self._channels)
        # Its answer comes even if there are no channels to be confirmed.
        self._transport.write(_PING)
        await ear.lost

    async def _watch(self) -> None:
        if self._transport is None or self._ear is None:
            return
        if self._unanswered >= MAX_UNANSWERED:
            # Not a clean end: a server that hangs, a network that swallows.
            self._ear.connection_lost(TimeoutError(f"no answer to {MAX_UNANSWERED} pings"))
            self._transport.abort()
        else:
            self._unanswered += 1
            self._transport.write(_PING)

    def _go_down(self) -> None:
        self.is_up = False
        self._was_lost = True
        self._transport = None
        # Those who wait go on: they look into PostgreSQL, and will again when the bus is up.
        for waiting in self._confirming.values():
            waiting.done.set_result(None)
        self._confirming.clear()

    # -------------------------------------------------------------------------------------------------- hearing

    def _hear(self, said: Any) -> None:  # noqa: ANN401 - whatever Redis says
        self._unanswered = 0
        if isinstance(said, hiredis.PushNotification):
            if said[0] == self._verbs.message:
                self.received += 1
                # A message by a pattern has the pattern before the channel.
                channel, words = said[-2:]
                if not words.startswith(self._origin):
                    self._deliver(channel[len(self._prefix) :], words[ORIGIN_BYTES:])
            elif said[0] == self._verbs.subscribed:
                self._confirm(said[1][len(self._prefix) :])
        elif isinstance(said, hiredis.ReplyError):
            # To a command of ours: what it should have said or followed has to be looked for elsewhere.
            raise said
        if not self.is_up and not self._unconfirmed:
            # What was added while the others were being confirmed comes next; then it is all there.
            self._ask_for(self._channels - self._asked)
            if not self._unconfirmed:
                self._go_up()

    def _confirm(self, channel: bytes) -> None:
        self._unconfirmed.discard(channel)
        if (waiting := self._confirming.get(channel)) is not None:
            waiting.commands -= 1
            if not waiting.commands:
                del self._confirming[channel]
                waiting.done.set_result(None)

    def _go_up(self) -> None:
        self.is_up = True
        self._asked.clear()
        if self._was_lost:
            log.info("the bus works again")
        self._caught_up()

    def _ask_for(self, channels: Iterable[bytes]) -> None:
        self._unconfirmed.update(channels)
        self._asked.update(channels)
        self._write([(self._verbs.subscribe, channel) for channel in sorted(channels)])

    def _command(self, verb: bytes, channel: bytes) -> None:
        if not self._commands:
            self._loop.call_soon(self._flush_commands)
        self._commands.append((verb, channel))

    def _flush_commands(self) -> None:
        commands, self._commands = self._commands, []
        if self.is_up:
            self._write(commands)

    def _write(self, commands: Iterable[tuple[bytes, bytes]]) -> None:
        # Neighbours of the same kind travel in one command; the order between kinds stays.
        groups: list[list[bytes]] = []
        for verb, channel in commands:
            if not groups or groups[-1][0] != verb or len(groups[-1]) > self._verbs.channels_at_once:
                groups.append([verb])
            groups[-1].append(self._prefix + channel)
        assert self._transport is not None  # noqa: S101 - called while connected
        self._transport.write(b"".join(_pack(*group) for group in groups))


class Alone(RedisBus):
    """The bus of the only worker: it publishes nothing, and receives all that commands of the operator publish."""

    def __init__(
        self, url: str, installation: str, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]
    ) -> None:
        """As RedisBus."""
        super().__init__(url, installation, deliver=deliver, caught_up=caught_up, verbs=PATTERNS)
        self._channels.add(EVERY)

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """All channels are received."""

    def unsubscribe(self, channel: bytes) -> None:
        """All channels are received."""

    def publish(self, channel: bytes, words: bytes) -> None:
        """No other worker is there."""


def prefix(installation: str) -> bytes:
    """Return what the names of an installation's channels begin with. Numbers of databases do not divide channels."""
    return f"{installation}:".encode()


def _pack(*words: bytes) -> bytes:
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its types know commands of one word only
    return packed


_PING = _pack(b"PING")
