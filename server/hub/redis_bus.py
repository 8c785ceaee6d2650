"""The bus between workers, by pub/sub of Redis or Valkey.

One connection publishes and subscribes. redis-py opens it, with its URL, TLS and authentication. Then the bus takes
over its transport, as a WebSocket does (docs/decisions/0004). Messages are written immediately, and the parser passes
received ones directly to the hub.

While the server cannot be reached, publishing does nothing and `is_up` is false. Subscribers then have to read missed
events from PostgreSQL.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

from server.core.errors import REDIS_LOST, log_failure, redis_unreachable
from server.core.periodic import end, every
from server.hub.bus import OF_WORKERS

CONNECT_SECONDS = 2.0
PING_SECONDS = 0.5
"""Interval of pings to the server, in seconds."""
MAX_UNANSWERED = 2
"""Number of unanswered pings after which the server is down. Pings are counted, because a worker that was suspended
itself has sent none in that time.
"""
REPLY_SECONDS = 2.0
"""Max wait for a reply while connecting, in seconds."""
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0)
"""Pauses between attempts to connect, in seconds. The last one repeats."""
ORIGIN_BYTES = 8
MAX_UNSENT_BYTES = 16 * 1024 * 1024
"""Max bytes that wait for a slow server. Further messages are dropped, and their events are found in PostgreSQL."""

log = logging.getLogger(__name__)


class Verbs(NamedTuple):
    """Names of the commands and messages of pub/sub, and the max number of channels per command."""

    publish: bytes
    subscribe: bytes
    unsubscribe: bytes
    subscribed: bytes
    message: bytes
    channels_at_once: int


PLAIN = Verbs(b"PUBLISH", b"SUBSCRIBE", b"UNSUBSCRIBE", b"subscribe", b"message", 500)
SHARDED = Verbs(b"SPUBLISH", b"SSUBSCRIBE", b"SUNSUBSCRIBE", b"ssubscribe", b"smessage", 1)
"""Those of a cluster. A channel belongs to one node, and one command takes channels of one slot."""
PATTERNS = Verbs(b"PUBLISH", b"PSUBSCRIBE", b"PUNSUBSCRIBE", b"psubscribe", b"pmessage", 500)
"""Those for patterns of channels."""
EVERY = b"*"
OTHERS_SECONDS = 5.0
"""Time for which another worker is assumed to run after its last heartbeat, in seconds."""


class _Receiver(asyncio.Protocol):
    """Parses the server's messages on one connection."""

    def __init__(self, received: Callable[[Any], None]) -> None:
        self._parser = hiredis.Reader()
        self._received = received
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (answer := self._parser.gets()) is not False:
                self._received(answer)
        except Exception as error:  # noqa: BLE001 - after any error this connection is unusable
            self.connection_lost(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            # The log must not report an error of this connection as one of PostgreSQL.
            if exc is None or isinstance(exc, OSError):
                exc = RedisConnectionError(str(exc or "it was closed"))
            self.lost.set_exception(exc)


@dataclass(slots=True)
class _Confirmation:
    """The result that subscribers of a channel wait for, and the number of unanswered commands for that channel."""

    done: asyncio.Future[None]
    commands: int = 0


class RedisBus:
    """This worker's connection to a Redis server."""

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
        """`installation` is the prefix of all channels on the server, because another installation may have equal ids.
        `deliver` is called with the channel and the content of each message of another worker. `caught_up` is called
        whenever the bus is up again.
        """
        self._pool = ConnectionPool.from_url(
            url, protocol=3, socket_timeout=REPLY_SECONDS, socket_connect_timeout=CONNECT_SECONDS, retry=None
        )
        self._deliver = deliver
        self._caught_up = caught_up
        self._verbs = verbs
        self._prefix = prefix(installation)
        # Each message begins with its sender, because this worker has already delivered its own events.
        self._origin = origin or os.urandom(ORIGIN_BYTES)
        self._channels: set[bytes] = set()
        self._confirming: dict[bytes, _Confirmation] = {}
        # For a connection that is not up yet: requested channels, and unconfirmed ones.
        self._asked: set[bytes] = set()
        self._unconfirmed: set[bytes] = set()
        self._commands: list[tuple[bytes, bytes]] = []
        self._transport: asyncio.WriteTransport | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._receiver: _Receiver | None = None
        self._was_lost = False
        self.is_up = False
        self.published = 0
        self.received = 0
        self.dropped = 0
        self.losses = 0

    async def start(self) -> None:
        """Connect. Raises Fatal if the server cannot be reached, which at the start is likely a mistake."""
        try:
            connection = await self._connect()
        except REDIS_LOST as error:
            raise redis_unreachable(error) from error
        self.begin(connection)

    def begin(self, connection: AbstractConnection | None = None) -> None:
        """Connect as soon as the server can be reached, and reconnect whenever the connection is lost."""
        self._tasks = [
            asyncio.create_task(self._stay(connection)),
            asyncio.create_task(every(PING_SECONDS, self._watch)),
        ]

    async def close(self) -> None:
        """Disconnect."""
        await end(self._tasks)

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Subscribe to channels, and return when that is confirmed. While the bus is down, return immediately."""
        new = [channel for channel in channels if channel not in self._channels]
        self._channels.update(new)
        if self.is_up:
            for channel in new:
                # It may wait for the answer to an earlier command, before an `unsubscribe`.
                waiting_for = self._confirming.setdefault(channel, _Confirmation(self._loop.create_future()))
                waiting_for.commands += 1
                self._command(self._verbs.subscribe, channel)
        waiting = [self._confirming[channel].done for channel in channels if channel in self._confirming]
        if waiting:
            await asyncio.wait(waiting)

    def unsubscribe(self, channel: bytes) -> None:
        """Unsubscribe from a channel."""
        self._channels.discard(channel)
        if self.is_up:
            self._command(self._verbs.unsubscribe, channel)

    def publish(self, channel: bytes, content: bytes) -> None:
        """Publish a message. The caller collects the events of one turn of the loop in one message per channel."""
        if self._transport is None or self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.dropped += 1
            self.losses += self.is_up  # or when the bus is up again
            return
        self._transport.write(_pack(self._verbs.publish, self._prefix + channel, self._origin + content))
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
            except Exception as error:  # noqa: BLE001 - any error means that there is no connection
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
        """Take over the connection. Raises the error that ends it."""
        receiver = self._receiver = _Receiver(self._receive)
        assert connection._writer is not None  # noqa: S101, SLF001 - it is connected
        self._transport = connection._writer.transport  # noqa: SLF001 - the public API goes through two more layers
        self._transport.set_protocol(receiver)
        self._unanswered = 0
        self._asked.clear()
        self._unconfirmed.clear()
        self._ask_for(self._channels)
        # The answer to this ping marks the bus as up if there are no channels to confirm.
        self._transport.write(_PING)
        await receiver.lost

    async def _watch(self) -> None:
        if self._transport is None or self._receiver is None:
            return
        if self._unanswered >= MAX_UNANSWERED:
            # The server hangs, or the network drops packets without an error.
            self._receiver.connection_lost(TimeoutError(f"no answer to {MAX_UNANSWERED} pings"))
            self._transport.abort()
        else:
            self._unanswered += 1
            self._transport.write(_PING)

    def _go_down(self) -> None:
        self.is_up = False
        self._was_lost = True
        self._transport = None
        # Subscribers proceed. They read PostgreSQL now, and again when the bus is up.
        for waiting in self._confirming.values():
            waiting.done.set_result(None)
        self._confirming.clear()

    # -------------------------------------------------------------------------------------- messages from Redis

    def _receive(self, answer: Any) -> None:  # noqa: ANN401 - any value of the protocol
        self._unanswered = 0
        if isinstance(answer, hiredis.PushNotification):
            if answer[0] == self._verbs.message:
                self.received += 1
                # A message by a pattern has the pattern before the channel.
                channel, content = answer[-2:]
                if not content.startswith(self._origin):
                    self._deliver(channel[len(self._prefix) :], content[ORIGIN_BYTES:])
            elif answer[0] == self._verbs.subscribed:
                self._confirm(answer[1][len(self._prefix) :])
        elif isinstance(answer, hiredis.ReplyError):
            # A command failed, so a message or a subscription is missing. Reconnect.
            raise answer
        if not self.is_up and not self._unconfirmed:
            # Subscribe to channels that were added meanwhile. The bus is up when none remain.
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
            # Messages in flight may be lost, too.
            self.losses += 1
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
        # Consecutive commands of the same kind are combined, which keeps the order.
        groups: list[list[bytes]] = []
        for verb, channel in commands:
            if not groups or groups[-1][0] != verb or len(groups[-1]) > self._verbs.channels_at_once:
                groups.append([verb])
            groups[-1].append(self._prefix + channel)
        assert self._transport is not None  # noqa: S101 - called while connected
        self._transport.write(b"".join(_pack(*group) for group in groups))


class Alone(RedisBus):
    """The bus of a single worker. It receives all messages, such as those of operators' commands. It publishes only
    heartbeats, until it receives one of another worker, which replaces this one or is replaced.
    """

    def __init__(
        self, url: str, installation: str, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]
    ) -> None:
        """The parameters are those of `RedisBus`."""
        super().__init__(url, installation, deliver=self._deliver_from_others, caught_up=caught_up, verbs=PATTERNS)
        self._deliver_all = deliver
        self._others_until = 0.0
        self._channels.add(EVERY)

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Do nothing, because all channels are received."""

    def unsubscribe(self, channel: bytes) -> None:
        """Do nothing, because all channels are received."""

    def publish(self, channel: bytes, content: bytes) -> None:
        """Publish a message if there is another worker, or if it is a heartbeat."""
        if channel.startswith(OF_WORKERS) or self._loop.time() < self._others_until:
            super().publish(channel, content)

    def _deliver_from_others(self, channel: bytes, content: bytes) -> None:
        if channel.startswith(OF_WORKERS):
            now = self._loop.time()
            was_alone = now >= self._others_until
            self._others_until = now + OTHERS_SECONDS
            if was_alone:
                self._caught_up()  # the other worker published nothing either
        self._deliver_all(channel, content)


def prefix(installation: str) -> bytes:
    """Return the prefix of an installation's channels. Channels are shared by all databases of a Redis server."""
    return f"{installation}:".encode()


def _pack(*parts: bytes) -> bytes:
    packed: bytes = hiredis.pack_command(parts)  # type: ignore[arg-type]  # its types know commands of one word only
    return packed


_PING = _pack(b"PING")
