"""`make scale`: simulates many servers with the measured costs of one.

Each message passes through queues: the sender's worker, a PostgreSQL, the worker again, a node of the bus, and each
worker with participants. Each step takes the CPU time that `make bench` measured. The results are the utilization of
each process, and the latency of deliveries. The simulation has no network delay. It stores each message separately,
while real workers share a commit between messages.
"""

import argparse
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.histogram import Histogram

MS = 1e3


class Costs(NamedTuple):
    """CPU seconds of each step, and memory of a connection. docs/scale.md names the runs that measured them."""

    accept: float = 270e-6
    store: float = 375e-6
    publish: float = 90e-6
    carry: float = 30e-6
    carry_each: float = 9e-6
    hear: float = 70e-6
    deliver: float = 10e-6
    idle_second: float = 2.6e-6
    connect: float = 0.83e-3
    connection_bytes: float = 9.2 * 1024


COMMIT_SECONDS = 1e-3
"""Time of a commit on the disk, in seconds. It does not block other messages."""


class Conversations(NamedTuple):
    """A kind of conversation, with its number of connected people and its share of all messages."""

    people: int
    share: float


MIX = (Conversations(10, 0.60), Conversations(100, 0.35), Conversations(1_000, 0.05))


class Station:
    """A server with a queue and one or more cores."""

    def __init__(self, cores: int, *, idle: float = 0.0) -> None:
        """`idle` is the share of CPU time that idle connections take."""
        self._free_at = [0.0] * cores
        self._slower = 1 / (1 - idle)
        self.cores = cores
        self.busy = 0.0

    def serve(self, at: float, seconds: float) -> float:
        """Process a job that arrives at `at`, and return when it is done. Calls are in the order of arrivals."""
        seconds *= self._slower
        self.busy += seconds
        done = max(at, self._free_at[0]) + seconds
        heapq.heapreplace(self._free_at, done)
        return done


class System:
    """All stations, and the messages that pass through them."""

    def __init__(self, options: argparse.Namespace, costs: Costs) -> None:
        idle = options.connections / options.workers * costs.idle_second
        self.costs = costs
        self.workers = [Station(1, idle=idle) for _ in range(options.workers)]
        self.databases = [Station(options.database_cores) for _ in range(options.databases)]
        self.nodes = [Station(1) for _ in range(options.nodes)]
        self.delivered = 0
        self.latency = Histogram()
        self._rng = random.Random(options.seed)  # noqa: S311 - a simulation, not a secret
        self._events: list[tuple[float, int, Iterator[float]]] = []
        self._places = itertools.count()

    def run(self, rate: float, seconds: float, progress: Progress) -> None:
        """Send messages at a rate, for a simulated duration."""
        task = progress.add_task(f"{seconds:.0f} seconds of {rate:,.0f} messages", total=seconds)
        due = 0.0
        while due < seconds or self._events:
            if due < seconds and (not self._events or due <= self._events[0][0]):
                self._go_on(due, self._message(due))
                due += self._rng.expovariate(rate)
                continue
            at, _, way = heapq.heappop(self._events)
            progress.update(task, completed=min(at, seconds))
            self._go_on(at, way)

    def _go_on(self, at: float, way: Iterator[float]) -> None:
        for then in way:
            heapq.heappush(self._events, (max(at, then), next(self._places), way))
            return

    def _message(self, due: float) -> Iterator[float]:
        """Simulate a message. Yields the times at which its next steps can begin."""
        costs, rng = self.costs, self._rng
        (kind,) = rng.choices(MIX, [one.share for one in MIX])
        there = Counter(rng.choices(range(len(self.workers)), k=kind.people))
        home = rng.randrange(len(self.workers))
        at = self.workers[home].serve(due, costs.accept)
        yield at
        at = rng.choice(self.databases).serve(at, costs.store) + COMMIT_SECONDS
        yield at
        publish = costs.publish if len(self.workers) > 1 else 0.0
        at = self.workers[home].serve(at, publish + there[home] * costs.deliver)
        self._deliver(due, at, there.pop(home, 0))
        if not there or not publish:
            return
        yield at
        heard = rng.choice(self.nodes).serve(at, costs.carry + costs.carry_each * (len(there) + 1))
        for worker, people in there.items():
            self._go_on(heard, self._arrival(due, heard, worker, people))

    def _arrival(self, due: float, heard: float, worker: int, people: int) -> Iterator[float]:
        yield heard
        done = self.workers[worker].serve(heard, self.costs.hear + people * self.costs.deliver)
        self._deliver(due, done, people)

    def _deliver(self, due: float, at: float, people: int) -> None:
        if people:
            self.delivered += people
            self.latency.add(at - due, people)


def show(console: Console, system: System, options: argparse.Namespace, seconds: float) -> None:
    """Print the utilization and the results."""
    table = Table(box=None, header_style="bold")
    for name in ("", "count", "cores", "busy", "busiest"):
        table.add_column(name, justify="left" if not name else "right")
    idle = options.connections / options.workers * system.costs.idle_second
    for name, stations, base in (
        ("workers", system.workers, idle),
        ("PostgreSQL", system.databases, 0.0),
        ("bus nodes", system.nodes, 0.0),
    ):
        loads = [one.busy / one.cores / seconds for one in stations]
        mean = sum(loads) / len(loads) + base
        cores = sum(one.cores for one in stations)
        table.add_row(name, str(len(stations)), str(cores), f"{mean:.0%}", f"{max(loads) + base:.0%}")
    console.print(table)
    each = options.connections / options.workers
    cpu = sum(one.busy for one in (*system.workers, *system.databases, *system.nodes))
    p50, p99 = (system.latency.percentile(share) * MS for share in (0.5, 0.99))
    back = each * system.costs.connect
    for line in (
        f"{options.connections:,} connections, {each * system.costs.connection_bytes / 2**20:,.0f} MiB per worker",
        f"{system.delivered / seconds:,.0f} deliveries per second, {cpu / system.delivered * 1e6:.0f} µs CPU each",
        f"send to socket: p50 {p50:.1f} ms, p99 {p99:.1f} ms, without the network",
        f"after the loss of a worker, its clients reconnect in {back / max(1, options.workers - 1):.1f} s",
        f"a reconnection of all clients takes {back:.0f} s",
    ):
        console.print(line)


def main() -> None:
    """Run the simulation and print its results."""
    parser = argparse.ArgumentParser(prog="make scale", description=__doc__)
    parser.add_argument("--connections", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64, help="worker processes, each with one core (64)")
    parser.add_argument(
        "--databases", type=int, default=2, help="PostgreSQL servers, each with some of the conversations (2)"
    )
    parser.add_argument("--database-cores", type=int, default=8, help="cores per PostgreSQL server (8)")
    parser.add_argument("--nodes", type=int, default=6, help="nodes of the Redis or Valkey cluster (6)")
    parser.add_argument("--minutes", type=float, default=2.0, help="minutes between two messages of a person (2)")
    parser.add_argument("--seconds", type=float, default=5.0, help="simulated seconds (5)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console(highlight=False)
    system = System(options, Costs())
    with Progress(console=console, transient=True) as progress:
        system.run(options.connections / options.minutes / 60, options.seconds, progress)
    show(console, system, options, options.seconds)


if __name__ == "__main__":
    main()
