"""Counters and gauges, and a page of them for all workers.

Counting is adding to a plain number. Once a second, each worker writes its numbers to a file in a folder that all
workers share. Any worker can combine the files into a page.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as Registered

from server.core.collector import Collector

STALE_SECONDS = 10.0
"""Max age of a file, in seconds. An older one belongs to a worker that has ended."""
RENDER_PAUSE_FACTOR = 20
"""Min pause after rendering a page, as a multiple of the time that rendering took. Any program of the machine
may ask.
"""
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency histogram, in seconds."""

LOGIN = "/v1/auth/login"
OTHER = "other"
LOGINS = {"200": "ok", "401": "wrong", "429": "limited"}
"""Results of a login, by HTTP status."""

GAUGES = {
    "connections": "Authenticated WebSocket connections.",
    "sockets": "TCP connections, from when they are accepted.",
    "conversations": "Conversations that the worker follows.",
    "bus_up": "Whether the bus between workers is connected, 1 or 0.",
    "database_connections": "Connections to PostgreSQL.",
    "database_waiting": "Statements and transactions that wait for a connection to PostgreSQL.",
    "tasks": "Tasks of the worker's event loop.",
    "shedding": "Number of kinds of frames that are refused because the worker is behind: typing, presence, receipts.",
}
COUNTERS = {
    "deliveries": "Events written to sockets.",
    "fetches": "Reads of missing events from PostgreSQL.",
    "deadlocks": "Transactions that PostgreSQL ended to break a deadlock, and that were retried.",
    "bus_published": "Messages published on the bus.",
    "bus_received": "Messages received from the bus.",
    "bus_dropped": "Messages that were not published on the bus. Workers read their events from PostgreSQL.",
    "shed": "Frames refused because the worker was behind.",
    "turned_away": "Connections that were told to retry later because too many clients were connecting.",
    "sockets_shed": "Connections closed or refused because descriptors ran out.",
    "sockets_timed_out": "Connections closed because a request did not arrive in time.",
    "gc_collections": "Runs of Python's garbage collector.",
    "gc_collected": "Objects in reference cycles that the garbage collector deleted.",
    "gc_seconds": "Time of the garbage collector, in seconds. The worker does nothing else meanwhile.",
}


class Snapshot(msgspec.Struct, kw_only=True):
    """One worker's numbers."""

    values: dict[str, float]
    frames: dict[str, int]
    refusals: dict[str, int]
    push_dropped: dict[str, int]
    answers: dict[str, int] = {}
    closed: dict[str, int] = {}
    job_overruns: dict[str, int] = {}
    faults: dict[str, int] = {}
    latency: list[int]
    latency_seconds: float


def _logins(snapshot: Snapshot) -> dict[str, int]:
    results = dict.fromkeys((*LOGINS.values(), OTHER), 0)
    for key, count in snapshot.answers.items():
        path, _, status = key.partition(" ")
        if path == LOGIN:
            results[LOGINS.get(status, OTHER)] += count
    return results


LABELLED: dict[str, tuple[str, list[str], Callable[[Snapshot], dict[str, int]]]] = {
    "frames": ("Frames answered, by type.", ["type"], lambda one: one.frames),
    "refusals": ("Frames refused, by code.", ["code"], lambda one: one.refusals),
    "push_dropped": ("Notifications dropped, by reason.", ["reason"], lambda one: one.push_dropped),
    "http_answers": ("HTTP answers, by path and status.", ["path", "status"], lambda one: one.answers),
    "logins": ("Logins, by result.", ["result"], _logins),
    "closed": ("WebSockets that the server closed, by code.", ["code"], lambda one: one.closed),
    "job_overruns": (
        "Runs of periodic jobs that took longer than their interval.",
        ["job"],
        lambda one: one.job_overruns,
    ),
    "database_faults": (
        "Statements that failed because the database was lost, busy or full, by kind.",
        ["kind"],
        lambda one: one.faults,
    ),
}
"""Counters with labels: the description, the label names, and a function that returns counts by label values."""


class Metrics:
    """This worker's numbers, and the folder with those of all workers."""

    def __init__(self, folder: Path, worker: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._worker = worker
        self._clock = clock
        self.frames: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.push_dropped: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        """Answers to HTTP requests and refused handshakes, by path and status."""
        self.closed: Counter[str] = Counter()
        """WebSockets that the server closed, by close code."""
        self.job_overruns: Counter[str] = Counter()
        """Runs of periodic jobs that took longer than their interval, by the job's name."""
        self.faults: Counter[str] = Counter()
        """Statements that failed because of a fault of the database, by its kind."""
        self.values: Callable[[], dict[str, float]] = dict
        self.collector = Collector()
        self._latency = [0] * (len(BUCKETS) + 1)
        self._latency_seconds = 0.0
        self._page = b""
        self._page_lasts_until = 0.0

    def answered(self, frame: str, seconds: float) -> None:
        """Count a frame that was answered after `seconds`."""
        self.frames[frame] += 1
        self._latency[bisect_left(BUCKETS, seconds)] += 1
        self._latency_seconds += seconds

    async def write(self) -> None:
        """Write this worker's numbers."""
        self.write_once()

    def write_once(self) -> None:
        """Write this worker's numbers."""
        snapshot = Snapshot(
            values=self.values() | self.collector.values(),
            frames=dict(self.frames),
            refusals=dict(self.refusals),
            push_dropped=dict(self.push_dropped),
            answers={f"{path} {status}": count for (path, status), count in self.answers.items()},
            closed=dict(self.closed),
            job_overruns=dict(self.job_overruns),
            faults=dict(self.faults),
            latency=self._latency,
            latency_seconds=self._latency_seconds,
        )
        path = self._folder / f"{self._worker}.json"
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(snapshot))
        unfinished.rename(path)

    def page(self) -> bytes:
        """Return all workers' numbers in Prometheus' text format. A recent page is reused."""
        began = self._clock()
        if began >= self._page_lasts_until:
            self.write_once()
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Collected(self._read()))
            self._page = generate_latest(registry)
            ended = self._clock()
            self._page_lasts_until = ended + (ended - began) * RENDER_PAUSE_FACTOR
        return self._page

    def _read(self) -> dict[str, Snapshot]:
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            if path.stat().st_mtime > time.time() - STALE_SECONDS:
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=Snapshot)
        return found


class _Collected(Registered):
    """The snapshots as metric families of Prometheus' client library."""

    def __init__(self, snapshots: dict[str, Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"openchat_{name}", text, labels=["worker"])
            for worker, snapshot in self._snapshots.items():
                gauge.add_metric([worker], snapshot.values.get(name, 0))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"openchat_{name}", text, labels=["worker"])
            for worker, snapshot in self._snapshots.items():
                counter.add_metric([worker], snapshot.values.get(name, 0))
            yield counter
        for name, (text, labels, counted) in LABELLED.items():
            labelled = CounterMetricFamily(f"openchat_{name}", text, labels=["worker", *labels])
            for worker, snapshot in self._snapshots.items():
                for key, count in counted(snapshot).items():
                    labelled.add_metric([worker, *key.split()], count)
            yield labelled
        latency = HistogramMetricFamily(
            "openchat_frame_seconds", "Time from a frame to its answer, in seconds.", labels=["worker"]
        )
        for worker, snapshot in self._snapshots.items():
            total, buckets = 0, []
            for bound, count in zip((*BUCKETS, "+Inf"), snapshot.latency, strict=True):
                total += count
                buckets.append((str(bound), total))
            latency.add_metric([worker], buckets, snapshot.latency_seconds)
        yield latency
