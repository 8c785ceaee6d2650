"""`make bench`: OpenChat and other servers with the same work, in turns, on one machine, in one run.

It compares memory, and the CPU time of all server processes (workers, PostgreSQL, Valkey) per unit of work. Both are
comparable even on a machine that other programs use. Latencies and max rates depend on those programs.
"""

import argparse
import asyncio
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import asyncpg
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import growth
from benchmarks.growth import Long, Short
from benchmarks.neighbour import neighbour
from benchmarks.servers import (
    Environment,
    Obvious,
    OpenChat,
    Picows,
    Server,
    SocketIo,
    UnansweredSocketIo,
    Uws,
)
from loadtest.command import best, find_limit
from loadtest.histogram import Histogram
from loadtest.progress import Progress
from loadtest.run import Phase, Run
from loadtest.scenario import Size
from loadtest.target import Unusable
from protocol.ids import uuid7

MS, US = 1e3, 1e6
BOUND_SECONDS = 0.25
BARE_SECONDS = 0.02
"""Pause between two bare commits, in seconds. It is short enough for percentiles, and too long to cause load."""
PROCESSES = 2
STORED: list[type[Server]] = [OpenChat, SocketIo, UnansweredSocketIo, Obvious]
ANSWERED: list[type[Server]] = [OpenChat, SocketIo, Obvious]
EVERYONE: list[type[Server]] = [OpenChat, Uws, Picows, SocketIo, Obvious]

Measured = dict[str, float]
"""Figures by name."""


class Workload(NamedTuple):
    """A workload of the comparison: the servers, the measurement, and the numbers of workers and rounds."""

    about: str
    servers: list[type[Server]]
    measure: Callable[[Server, float], Awaitable[Measured]]
    workers: tuple[int, ...] = (1,)
    rounds: int | None = None


def drive(scenario: str, size: Size) -> Callable[[Server, float], Awaitable[Measured]]:
    """Return a function that measures a scenario. The rate of `size` is per worker."""

    async def measure(server: Server, seconds: float) -> Measured:
        load = msgspec.structs.replace(size, rate=size.rate * server.workers)
        async with Run(server, scenario, load, processes=PROCESSES, progress=Progress()) as run:
            await run.connect()
            phase = await run.drive(seconds, load.rate)
        return of_phase(phase)

    return measure


def beside_neighbour(
    measure: Callable[[Server, float], Awaitable[Measured]],
) -> Callable[[Server, float], Awaitable[Measured]]:
    """Return a function that measures the same beside a noisy neighbour."""

    async def beside(server: Server, seconds: float) -> Measured:
        with neighbour():
            return await measure(server, seconds)

    return beside


def acknowledge(scenario: str, size: Size) -> Callable[[Server, float], Awaitable[Measured]]:
    """Return a function that measures answers, and concurrently commits of one bare row in the same database."""

    async def measure(server: Server, seconds: float) -> Measured:
        bare = Histogram()
        async with Run(server, scenario, size, processes=PROCESSES, progress=Progress()) as run:
            await run.connect()
            committing = asyncio.create_task(commit_rows(server.database(), bare))
            phase = await run.drive(seconds, size.rate)
            committing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await committing
        p99, bare_p99 = of_phase(phase)["answer p99 ms"], bare.percentile(0.99) * MS
        return {
            "answer p50 ms": Histogram(phase.tally.answers).percentile(0.5) * MS,
            "answer p99 ms": p99,
            "bare commit p50 ms": bare.percentile(0.5) * MS,
            "bare commit p99 ms": bare_p99,
            "p99 of answers / of commits": p99 / bare_p99,
        }

    return measure


async def commit_rows(url: str, times: Histogram) -> None:
    """Insert rows one by one, and record the duration of each, until cancelled."""
    db = await asyncpg.connect(url)
    try:
        await db.execute("CREATE TABLE IF NOT EXISTS bare (id uuid PRIMARY KEY, said text)")
        while True:
            began = time.perf_counter()
            await db.execute("INSERT INTO bare VALUES ($1, 'Hello')", uuid7())
            times.add(time.perf_counter() - began)
            await asyncio.sleep(BARE_SECONDS)
    finally:
        db.terminate()


def of_phase(phase: Phase) -> Measured:
    """Return the figures of work at a rate. Raises Unusable if events were lost or frames refused."""
    tally = phase.tally
    if tally.wrong or tally.errors:
        raise Unusable(f"{tally.wrong} events were lost, duplicated or out of order; errors: {tally.errors}")
    measured = {
        "µs CPU per delivery": phase.cpu_seconds / tally.delivered * US,
        "µs CPU per message": phase.cpu_seconds / tally.sent * US,
        "delivery p50 ms": Histogram(tally.deliveries).percentile(0.5) * MS,
        "delivery p99 ms": Histogram(tally.deliveries).percentile(0.99) * MS,
    }
    measured |= {f"of {kind}": seconds / tally.sent * US for kind, seconds in sorted(phase.cpu.items())}
    if tally.answers:
        measured["answer p99 ms"] = Histogram(tally.answers).percentile(0.99) * MS
    return measured


def ceiling(scenario: str, size: Size, *, start: float) -> Callable[[Server, float], Awaitable[Measured]]:
    """Return a function that finds the highest rate with p99 within the bound. It begins at the rate `start`.
    The number of senders follows from the rate of `size`.
    """

    async def measure(server: Server, seconds: float) -> Measured:
        async with Run(server, scenario, size, processes=PROCESSES, progress=Progress()) as run:
            await run.connect()
            await find_limit(run, start, BOUND_SECONDS, seconds=seconds / 2)
            carried = best(run.result, BOUND_SECONDS)
        if carried is None:
            raise Unusable(f"the server did not sustain {start:,.0f} per second, the first rate")
        return {
            "deliveries per second": carried.tally.delivered / carried.load_seconds,
            "µs CPU per delivery": carried.cpu_seconds / carried.tally.delivered * US,
        }

    return measure


def connect(scenario: str, size: Size) -> Callable[[Server, float], Awaitable[Measured]]:
    """Return a function that measures opening connections, and idle ones."""

    async def measure(server: Server, seconds: float) -> Measured:
        async with Run(server, scenario, size, processes=PROCESSES, progress=Progress()) as run:
            connected = await run.connect()
            quiet = await run.drive(seconds, 0.0)
            base = run.result.base_memory
        count = connected.tally.connected
        return {
            "ms CPU per connection": connected.cpu_seconds / count * MS,
            "KiB per connection": (quiet.memory["server"] - base["server"]) / count / 1024,
            "% of a core while idle": quiet.cpu_seconds / quiet.seconds * 100,
        }

    return measure


def size_of(people: int, rate: float, *, group: int) -> Size:
    """Return the size of a run with one connection per person."""
    return Size(people=people, connections=people, group=group, rate=rate)


ROOM = size_of(1_000, 20, group=1_000)
TEAMS = size_of(2_000, 200, group=10)

WORKLOADS: dict[str, Workload] = {
    "room": Workload("1,000 connected, 20 messages per second", EVERYONE, drive("room", ROOM)),
    "room-ceiling": Workload(
        "1,000 connected, the highest rate with p99 within 250 ms",
        EVERYONE,
        ceiling("room", msgspec.structs.replace(ROOM, rate=1_000), start=40),
        rounds=1,
    ),
    "teams": Workload("200 conversations of 10, 200 messages per second", STORED, drive("teams", TEAMS)),
    "teams-noisy": Workload(
        "teams, beside a neighbour that uses half of a core and the caches",
        STORED,
        beside_neighbour(drive("teams", TEAMS)),
    ),
    "teams-ceiling": Workload(
        "200 conversations of 10, the highest rate with p99 within 250 ms",
        STORED,
        ceiling("teams", TEAMS, start=600),
        workers=(1, 2),
        rounds=1,
    ),
    "teams-workers": Workload(
        "200 conversations of 10, 500 messages per second and worker",
        [OpenChat],
        drive("teams", msgspec.structs.replace(TEAMS, rate=500)),
        workers=(1, 2),
    ),
    "ack": Workload(
        "500 pairs, 200 messages per second, and commits of one bare row",
        [OpenChat],
        acknowledge("direct", size_of(1_000, 200, group=2)),
    ),
    "growth": Workload("the same frames with little and with much history", [Short, Long], growth.measure),
    "idle": Workload("5,000 authenticated connections", EVERYONE, connect("idle", size_of(5_000, 0, group=10))),
    "idle-many": Workload(
        "15,000 authenticated connections", [OpenChat], connect("idle", size_of(15_000, 0, group=10))
    ),
    "storm": Workload("2,000 connect as fast as possible", ANSWERED, connect("storm", size_of(2_000, 0, group=10))),
}


class Results:
    """The measured figures, and their comparison."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.measured: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, workload: str, who: str, figures: Measured) -> None:
        """Add the figures of one turn."""
        mine = self.measured.setdefault(workload, {}).setdefault(who, defaultdict(list))
        for name, value in figures.items():
            mine[name].append(value)

    def show(self, workload: str) -> None:
        """Print the medians of one workload, and each as a multiple of OpenChat's."""
        rows = self.measured.get(workload)
        if not rows:
            return
        names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
        table = Table(
            box=None, header_style="bold", title=f"{workload}: {WORKLOADS[workload].about}", title_justify="left"
        )
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        ours = next(iter(rows.values()))
        for who, figures in rows.items():
            cells = []
            for name in names:
                if name not in figures:
                    cells.append("-")
                    continue
                median = statistics.median(figures[name])
                ratio = median / statistics.median(ours[name]) if ours.get(name) else 0
                cells.append(
                    f"{median:,.4g} [dim]({ratio:.2f} x)[/]" if figures is not ours and ratio else f"{median:,.4g}"
                )
            table.add_row(who, *cells)
        self.console.print(table)
        self.console.print()


async def compare(options: argparse.Namespace, environment: Environment, console: Console) -> Results:
    """Measure all workloads, in turns."""
    results = Results(console)
    for name in options.workload or WORKLOADS:
        for turn in range(WORKLOADS[name].rounds or options.rounds):
            for workers in WORKLOADS[name].workers:
                for kind in WORKLOADS[name].servers:
                    if options.only and not kind.name.startswith(tuple(options.only)):
                        continue
                    await take_turn(results, name, kind(environment, workers=workers), turn, options.seconds)
        results.show(name)
    return results


async def take_turn(results: Results, name: str, server: Server, turn: int, seconds: float) -> None:
    """Measure one workload with one server, once."""
    who = server.name + (f", {server.workers} workers" if server.workers > 1 else "")
    if not server.is_there():
        results.console.print(f"[red]{who} is not installed[/]")
        return
    results.console.print(f"[dim]{name}: {who}, turn {turn + 1} …[/]")
    try:
        async with server:
            results.add(name, who, await WORKLOADS[name].measure(server, seconds))
    except Unusable as error:
        results.console.print(f"[red]{who}: {error}[/]")


def main() -> int:
    """Measure, print the comparison, and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("workload", nargs="*", metavar="WORKLOAD", help=f"any of {', '.join(WORKLOADS)} (all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only servers whose names begin with NAME")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each server (3); workloads with a fixed number ignore it"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of load per turn (10)")
    parser.add_argument(
        "--database-delay", type=float, default=0.0, metavar="MS", help="round trip to add to PostgreSQL, in ms (0)"
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="file for the figures (bench.json)")
    options = parser.parse_args()
    if unknown := set(options.workload) - set(WORKLOADS):
        parser.error(f"unknown WORKLOAD: {', '.join(unknown)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    began = time.monotonic()
    path = Path(tempfile.mkdtemp(prefix="openchat-bench-"))
    path.chmod(0o755)  # root starts PostgreSQL as another user
    try:
        with Environment(path, database_delay=options.database_delay / MS) as environment:
            results = uvloop.run(compare(options, environment, console))
    finally:
        shutil.rmtree(path, ignore_errors=True)
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results.measured)))
    console.print(f"{(time.monotonic() - began) / 60:.0f} minutes. All figures are in {options.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
