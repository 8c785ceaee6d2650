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

from loadtest.ledger import Ledger
from loadtest.line import Later, Line
from loadtest.orders import Connect, Done, Drive, Fill, Order, Report, Settle, Tick
from loadtest.scenario import Scenario
from loadtest.scenarios import SCENARIOS
from loadtest.scenarios.history import message_id
from loadtest.stream import Stream
from protocol.client import Send
from protocol.ids import ConversationId

TICK_SECONDS = 0.5
PATIENCE = 30.0
"""Max wait for an answer or a connection, in seconds."""
FILL_AT_ONCE = 256
LOOK_SECONDS = 0.02
AGAIN_SECONDS = 0.1

_orders = msgspec.json.Decoder(Order)


class Crowd:
    """The connections of this process."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.lines: list[Line] = []
        self.streams: dict[str, Stream] = {}
        self.members: dict[str, list[str]] = {}
        self.host = ("", 0)
        self.name = ""
        self._behind = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, orders: asyncio.StreamReader) -> None:
        """Carry out orders until the input ends."""
        ticking = asyncio.create_task(self._tick())
        while line := await orders.readline():
            try:
                say(await self._obey(_orders.decode(line)))
            except (OSError, TimeoutError) as error:
                say(Done(failed=str(error) or "timed out"))
        ticking.cancel()

    async def _obey(self, order: Order) -> Done:
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
        module, _, name = order.line.partition(":")
        kind: type[Line] = getattr(importlib.import_module(module), name)
        self.host, self.name = (order.address, order.port), order.host
        self.members |= order.members
        lines = [kind(self, seat) for seat in order.seats]
        waiting = iter(lines)

        async def connect_some() -> None:
            for line in waiting:
                await self._arrive(line)

        await asyncio.gather(*(connect_some() for _ in range(min(order.at_once, len(lines)))))
        self.lines += lines
        if order.is_quiet:
            self.ledger.take()

    async def _drive(self, order: Drive) -> None:
        scenario = SCENARIOS[order.scenario](self, order.size, order.seed)
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
        late = self.lines
        while late and time.monotonic() < deadline:
            late = [line for line in late if self._is_late(line, order)]
            await asyncio.sleep(LOOK_SECONDS)
        for line in late:
            self.ledger.lost += self._missing(line, order)
            self.ledger.errors["no answer"] += line.is_waiting
        for line in self.lines:
            line.leave_stream()
        self.streams.clear()

    def _is_late(self, line: Line, order: Settle) -> bool:
        return line.is_parting or (line.is_open and (line.is_waiting or bool(self._missing(line, order))))

    def _missing(self, line: Line, order: Settle) -> int:
        if not line.is_ordered:
            return 0
        return sum(max(0, order.versions.get(one, 0) - line.position(one)) for one in line.seat.conversations)

    async def _fill(self, order: Fill) -> None:
        talkers = [line for line in self.lines if line.seat.talks]
        numbers = iter(range(order.first, order.last))
        about = ConversationId(UUID(order.conversation_id))

        async def write(line: Line) -> None:
            for number in numbers:
                message = Send(
                    conversation_id=about,
                    message_id=message_id(order.conversation_id, number),
                    content=f"This is message {number:,} of a long conversation, and not the last one.",
                )
                await asyncio.wait_for(line.answer(message), PATIENCE)

        await asyncio.gather(*(write(line) for line in talkers for _ in range(-(-FILL_AT_ONCE // len(talkers)))))

    def _join_streams(self) -> None:
        for line in self.lines:
            if len(line.positions) == 1 and line.is_open:
                ((about, version),) = line.positions.items()
                stream = self.streams.get(about)
                if stream is None:
                    stream = self.streams[about] = Stream(version)
                if stream.version == version:
                    line.join_stream(about, stream)

    def _versions(self) -> dict[str, int]:
        versions: dict[str, int] = {}
        for line in self.lines:
            for about in line.seat.conversations:
                versions[about] = max(versions.get(about, 0), line.position(about))
        return versions

    def reconnect(self, line: Line, due: int) -> None:
        """Reconnect a line at `due`, in nanoseconds of the monotonic clock."""
        self._spawn(self._reconnect(line, due))

    async def _reconnect(self, line: Line, due: int) -> None:
        await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                await self._arrive(line, due=max(due / 1e9, line.began))
            except ConnectionError:
                await asyncio.sleep(AGAIN_SECONDS)  # no server listens at the moment
            except (OSError, TimeoutError):
                break
            else:
                return
        line.is_parting = False
        self.ledger.errors["could not reconnect"] += 1

    async def _arrive(self, line: Line, *, due: float | None = None) -> None:
        """Connect a line, and retry as long as the server asks to connect later."""
        while True:
            try:
                await asyncio.wait_for(line.connect(due=due), PATIENCE)
            except Later as error:
                self.ledger.turned_away += 1
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
            say(Tick(tally=self.ledger.take(), open=sum(line.is_open for line in self.lines), behind=self._behind))


def say(report: Report) -> None:
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
