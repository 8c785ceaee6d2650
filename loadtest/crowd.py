"""One process of the crowd, with its connections and their actions. The command starts it and sends it orders.

`python -m loadtest.crowd` reads orders from standard input, one line of JSON each, and ends when the input closes.
"""

import asyncio
import gc
import importlib
import resource
import sys
import time
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

import msgspec
import uvloop

from loadtest.connection import Connection, RetryLater
from loadtest.counters import Counters
from loadtest.orders import Connect, Done, Drive, Fill, Order, Report, Settle, Tick
from loadtest.scenario import Scenario
from loadtest.scenarios import ALL
from loadtest.scenarios.history import message_id
from loadtest.stream import Stream
from protocol.client import Send
from protocol.ids import ConversationId

TICK_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0
"""Max wait for an answer or a connection, in seconds."""
FILL_AT_ONCE = 256
POLL_SECONDS = 0.02
RETRY_SECONDS = 0.1

_orders = msgspec.json.Decoder(Order)


class Crowd:
    """The connections of this process."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.connections: list[Connection] = []
        self.streams: dict[str, Stream] = {}
        self.members: dict[str, list[str]] = {}
        self.host = ("", 0)
        self.name = ""
        self._behind = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, orders: asyncio.StreamReader) -> None:
        """Carry out orders until the input ends."""
        ticking = asyncio.create_task(self._tick())
        while text := await orders.readline():
            try:
                emit(await self._execute(_orders.decode(text)))
            except (OSError, TimeoutError) as error:
                emit(Done(failed=str(error) or "timed out"))
        ticking.cancel()

    async def _execute(self, order: Order) -> Done:
        if isinstance(order, Connect):
            await self._connect(order)
        elif isinstance(order, Drive):
            await self._drive(order)
        elif isinstance(order, Settle):
            await self._settle(order)
        else:
            await self._fill(order)
        return Done(versions=self._versions())

    async def _connect(self, order: Connect) -> None:
        module, _, name = order.connection.partition(":")
        kind: type[Connection] = getattr(importlib.import_module(module), name)
        self.host, self.name = (order.address, order.port), order.host
        self.members |= order.members
        connections = [kind(self, user) for user in order.users]
        waiting = iter(connections)

        async def connect_some() -> None:
            for connection in waiting:
                await self._open(connection)

        await asyncio.gather(*(connect_some() for _ in range(min(order.at_once, len(connections)))))
        self.connections += connections
        if order.is_quiet:
            self.counters.take()

    async def _drive(self, order: Drive) -> None:
        scenario = ALL[order.scenario](self, order.size, order.seed)
        if scenario.is_broadcast:
            self._join_streams()
        scenario.begin()
        gc.collect()
        gc.freeze()
        if order.rate:
            await self._act(scenario, order)
        await asyncio.sleep(max(0.0, (order.end - time.monotonic_ns()) / 1e9))

    async def _act(self, scenario: Scenario, order: Drive) -> None:
        interval = 1e9 / order.rate
        count = 0
        while (due := order.begin + int(count * interval)) < order.end:
            wait = due - time.monotonic_ns()
            if wait > 0:
                await asyncio.sleep(wait / 1e9)
                continue
            # Open loop. A late action runs immediately, and its latency counts from its due time.
            self._behind = -wait / 1e9
            scenario.act(due)
            count += 1
            if not count % 50:
                await asyncio.sleep(0)

    async def _settle(self, order: Settle) -> None:
        deadline = time.monotonic() + order.seconds
        for task in list(self._tasks):
            await task
        late = self.connections
        while late and time.monotonic() < deadline:
            late = [connection for connection in late if self._is_late(connection, order)]
            await asyncio.sleep(POLL_SECONDS)
        for connection in late:
            self.counters.lost += self._missing(connection, order)
            self.counters.errors["no answer"] += connection.is_waiting
        for connection in self.connections:
            connection.leave_stream()
        self.streams.clear()

    def _is_late(self, connection: Connection, order: Settle) -> bool:
        return connection.is_reconnecting or (
            connection.is_open and (connection.is_waiting or bool(self._missing(connection, order)))
        )

    def _missing(self, connection: Connection, order: Settle) -> int:
        if not connection.is_ordered:
            return 0
        return sum(
            max(0, order.versions.get(one, 0) - connection.position(one)) for one in connection.user.conversations
        )

    async def _fill(self, order: Fill) -> None:
        talkers = [connection for connection in self.connections if connection.user.talks]
        numbers = iter(range(order.first, order.last))
        about = ConversationId(UUID(order.conversation_id))

        async def write(connection: Connection) -> None:
            for number in numbers:
                message = Send(
                    conversation_id=about,
                    message_id=message_id(order.conversation_id, number),
                    content=f"This is message {number:,} of a long conversation, and not the last one.",
                )
                await asyncio.wait_for(connection.answer(message), TIMEOUT_SECONDS)

        await asyncio.gather(
            *(write(connection) for connection in talkers for _ in range(-(-FILL_AT_ONCE // len(talkers))))
        )

    def _join_streams(self) -> None:
        for connection in self.connections:
            if len(connection.positions) == 1 and connection.is_open:
                ((about, version),) = connection.positions.items()
                stream = self.streams.get(about)
                if stream is None:
                    stream = self.streams[about] = Stream(version)
                if stream.version == version:
                    connection.join_stream(about, stream)

    def _versions(self) -> dict[str, int]:
        versions: dict[str, int] = {}
        for connection in self.connections:
            for about in connection.user.conversations:
                versions[about] = max(versions.get(about, 0), connection.position(about))
        return versions

    def reconnect(self, connection: Connection, due: int) -> None:
        """Reconnect a connection at `due`, in nanoseconds of the monotonic clock."""
        self._spawn(self._reconnect(connection, due))

    async def _reconnect(self, connection: Connection, due: int) -> None:
        await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            try:
                await self._open(connection, due=max(due / 1e9, connection.began))
            except ConnectionError:
                await asyncio.sleep(RETRY_SECONDS)  # no server listens at the moment
            except (OSError, TimeoutError):
                break
            else:
                return
        connection.is_reconnecting = False
        self.counters.errors["could not reconnect"] += 1

    async def _open(self, connection: Connection, *, due: float | None = None) -> None:
        """Open a connection, and retry as long as the server asks to connect later."""
        while True:
            try:
                await asyncio.wait_for(connection.connect(due=due), TIMEOUT_SECONDS)
            except RetryLater as error:
                self.counters.deferred += 1
                await asyncio.sleep(error.seconds)
            else:
                return

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            emit(
                Tick(
                    tally=self.counters.take(),
                    open=sum(connection.is_open for connection in self.connections),
                    behind=self._behind,
                )
            )


def emit(report: Report) -> None:
    """Write a report to the command."""
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


async def main() -> None:
    """Raise the limit of open files and serve the command."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reader = asyncio.StreamReader(limit=1 << 28)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await Crowd().serve(reader)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
