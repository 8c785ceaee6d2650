"""One run of a scenario: connections, actions at a rate, and results."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import msgspec

from loadtest.connection import User
from loadtest.counters import Tally
from loadtest.histogram import Histogram
from loadtest.load_average import LoadAverage
from loadtest.machine import Machine, Usage
from loadtest.orders import Connect, Done, Drive, Fill, Order, Report, Settle, Tick
from loadtest.progress import Progress
from loadtest.scenario import Size
from loadtest.scenarios import ALL
from loadtest.target import Target, Unusable

SETTLE_SECONDS = 30.0
"""Max wait for events after a phase, in seconds. After that, they count as lost."""
START_SECONDS = 0.5
"""Delay between the orders to the processes and the common start, in seconds."""
REST_SECONDS = 1.0
"""Pause between phases, in seconds, so that remaining work of the server is not counted in the next phase."""
FILL_BLOCK = 5_000

_reports: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


class Moment(msgspec.Struct, kw_only=True):
    """One second of a run, for the plots."""

    at: float
    """Seconds since the phase began."""
    sent: float
    """Rate per second, like the other rates."""
    delivered: float
    answer_p50: float
    answer_p99: float
    delivery_p50: float
    delivery_p99: float
    returned: float
    """Reconnections."""
    cpu: dict[str, float]
    """Cores used by each kind of server process; empty if the server is on another machine."""


class Phase(msgspec.Struct, kw_only=True):
    """The results and costs of one part of a run."""

    name: str
    rate: float
    seconds: float
    load_seconds: float
    """The part of the duration in which frames were offered."""
    tally: Tally
    cpu: dict[str, float]
    """CPU seconds by kind of server process; empty if the server is on another machine."""
    memory: dict[str, int]
    """Bytes at the end, by kind of server process."""
    crowd_cpu: float
    """CPU seconds of the crowd's own processes."""
    behind: float
    """Max lateness of the crowd itself, in seconds. More than a few milliseconds distorts the latencies."""
    warmed_up: int = 0
    """Connections that were opened before the phase, one per process of the crowd, and are not measured."""
    moments: list[Moment]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all server processes."""
        return sum(self.cpu.values())


class Result(msgspec.Struct, kw_only=True):
    """A whole run."""

    scenario: str
    where: str
    people: int
    connections: int
    base_memory: dict[str, int]
    """Bytes before the measured connections, by kind of server process."""
    load_average: LoadAverage
    phases: list[Phase]

    @property
    def wrong(self) -> int:
        """The number of events that did not arrive once and in order."""
        return sum(phase.tally.wrong for phase in self.phases)

    @property
    def errors(self) -> dict[str, int]:
        """The number of errors, by kind."""
        total = Tally()
        for phase in self.phases:
            total.add(Tally(errors=phase.tally.errors))
        return total.errors


class Process:
    """A child process of the crowd."""

    def __init__(self, process: asyncio.subprocess.Process, on_frame: Callable[[Tick], None]) -> None:
        self._process = process
        self._on_tick = on_frame
        self._done: asyncio.Future[Done] | None = None
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def execute(self, order: Order) -> Done:
        """Send an order and wait until it is done. Raises Unusable if it fails."""
        self._done = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None  # noqa: S101 - asked for
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        done = await self._done
        if done.failed:
            raise Unusable(f"the crowd failed: {done.failed}")
        return done

    async def stop(self) -> None:
        """Kill the process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._reading.cancel()

    async def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - asked for
        while text := await self._process.stdout.readline():
            report = _reports.decode(text)
            if isinstance(report, Tick):
                self._on_tick(report)
            elif self._done is not None:
                self._done.set_result(report)
        if self._done is not None and not self._done.done():
            self._done.set_result(Done(failed="one of its processes ended"))


class Run:
    """A crowd for one target. It is an async context manager, and its processes end with it."""

    def __init__(self, target: Target, scenario: str, size: Size, *, processes: int, progress: Progress) -> None:
        self._target = target
        self._scenario = ALL[scenario]
        self._size = size
        self._count = processes
        self.progress = progress
        self._processes: list[Process] = []
        self._parts: list[list[User]] = []
        self._ticks: list[Tick] = []
        self._phases: list[Phase] = []
        self._base: dict[str, int] = {}
        self._seats = 0
        self._load_average = LoadAverage.begin()

    async def __aenter__(self) -> Self:
        for _ in range(self._count):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "loadtest.crowd",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 28,
            )  # fmt: skip
            self._processes.append(Process(process, self._ticks.append))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            await process.stop()

    @property
    def result(self) -> Result:
        """The results until now."""
        return Result(
            scenario=self._scenario.name,
            where=f"{self._target.host}:{self._target.port}",
            people=self._size.people,
            connections=self._seats,
            base_memory=self._base,
            load_average=self._load_average.update(),
            phases=self._phases,
        )

    async def connect(self, *, at_once: int = 64) -> Phase:
        """Connect everyone as fast as possible, with max `at_once` connections pending."""
        users, members = await self._target.prepare(self._scenario.layout(self._size), self.progress)
        users = [users[number % len(users)] for number in range(self._size.connections)]
        self._seats = len(users)
        target = self._target
        # The participants of a conversation are spread over all processes, so every process has some senders.
        self._parts = [users[number :: self._count] for number in range(self._count)]

        def order(users: list[User], at_once: int) -> Connect:
            mine = {one for user in users for one in user.conversations}
            return Connect(
                connection=target.connection, host=target.host, address=target.address, port=target.port, users=users,
                members={one: members[one] for one in mine}, at_once=at_once,
            )  # fmt: skip

        # The first connections allocate memory only once, so they are not measured.
        await asyncio.gather(
            *(
                process.execute(msgspec.structs.replace(order(part[:1], 1), is_quiet=True))
                for process, part in zip(self._processes, self._parts, strict=True)
            )
        )
        await asyncio.sleep(REST_SECONDS)
        self._base = dict(self._target.machine.usage(memory=True).memory)
        async with self._phase("connect"):
            share = max(1, at_once // self._count)
            await asyncio.gather(
                *(
                    process.execute(order(part[1:], share))
                    for process, part in zip(self._processes, self._parts, strict=True)
                )
            )
        self._phases[-1].warmed_up = sum(bool(part) for part in self._parts)
        return self._phases[-1]

    async def drive(self, seconds: float, rate: float, *, name: str = "") -> Phase:
        """Perform the scenario's actions at a rate, wait for remaining events, and return the results. `name` is that
        of the phase, by default the scenario's.
        """
        await asyncio.sleep(REST_SECONDS)
        async with self._phase(name or self._scenario.name, rate, seconds):
            begin = time.monotonic_ns() + int(START_SECONDS * 1e9)
            talking = [sum(user.talks for user in part) for part in self._parts]
            done = await asyncio.gather(*(
                process.execute(
                    Drive(
                        scenario=self._scenario.name, size=self._size, rate=rate * share / sum(talking),
                        begin=begin, end=begin + int(seconds * 1e9), seed=number,
                    )
                )
                for number, (process, share) in enumerate(zip(self._processes, talking, strict=True))
            ))  # fmt: skip
            # Two rounds. The first one waits for the last answers, and the second for the events of these answers.
            for _ in range(2):
                versions: dict[str, int] = {}
                for one in done:
                    for about, version in one.versions.items():
                        versions[about] = max(version, versions.get(about, 0))
                done = await asyncio.gather(
                    *(process.execute(Settle(versions=versions, seconds=SETTLE_SECONDS)) for process in self._processes)
                )
        return self._phases[-1]

    async def fill(self, conversation_id: str, first: int, last: int) -> AsyncIterator[int]:
        """Write messages of a conversation as fast as possible, and yield the number after each block."""
        for start in range(first, last, FILL_BLOCK * self._count):
            ends = [min(last, start + FILL_BLOCK * (number + 1)) for number in range(self._count)]
            orders = [
                Fill(conversation_id=conversation_id, first=min(last, start + FILL_BLOCK * number), last=end)
                for number, end in enumerate(ends)
            ]
            await asyncio.gather(*(one.execute(order) for one, order in zip(self._processes, orders, strict=True)))
            yield ends[-1]

    @contextlib.asynccontextmanager
    async def _phase(self, name: str, rate: float = 0.0, load_seconds: float = 0.0) -> AsyncIterator[None]:
        machine = self._target.machine
        self._ticks.clear()
        moments: list[Moment] = []
        total, behind = Tally(), 0.0
        before, own, began = machine.usage(), self._own(), time.monotonic()
        last, at = before, began

        def sample() -> None:
            """Append a moment with the ticks since the last one."""
            nonlocal last, at, behind
            now, usage = time.monotonic(), machine.usage()
            tally = Tally()
            for tick in self._ticks:
                tally.add(tick.tally)
                behind = max(behind, tick.behind)
            self._ticks.clear()
            total.add(tally)
            moments.append(_moment(now - began, now - at, tally, usage, last))
            self.progress.update(name, moments[-1], total)
            last, at = usage, now

        async def keep_sampling() -> None:
            while True:
                await asyncio.sleep(1.0)
                sample()

        sampling = asyncio.create_task(keep_sampling())
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            after = machine.usage(memory=True)
            crowd_cpu = self._own() - own
            sampling.cancel()
        await asyncio.sleep(REST_SECONDS)  # for the last ticks
        sample()
        self._phases.append(
            Phase(
                name=name, rate=rate, seconds=seconds, load_seconds=load_seconds or seconds, tally=total,
                moments=moments[:-1] or moments,
                cpu={kind: used - before.cpu.get(kind, 0.0) for kind, used in after.cpu.items()},
                memory=dict(after.memory), crowd_cpu=crowd_cpu, behind=behind,
            )
        )  # fmt: skip

    def _own(self) -> float:
        return Machine([process.pid for process in self._processes]).usage().seconds


def _moment(at: float, seconds: float, tally: Tally, usage: Usage, last: Usage) -> Moment:
    answers, deliveries = Histogram(tally.answers), Histogram(tally.deliveries)
    return Moment(
        at=at,
        sent=tally.sent / seconds,
        delivered=tally.delivered / seconds,
        answer_p50=answers.percentile(0.5),
        answer_p99=answers.percentile(0.99),
        delivery_p50=deliveries.percentile(0.5),
        delivery_p99=deliveries.percentile(0.99),
        returned=tally.resumed / seconds,
        cpu={kind: (used - last.cpu.get(kind, 0.0)) / seconds for kind, used in usage.cpu.items()},
    )
