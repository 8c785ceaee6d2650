"""The figures of a run as text, for the terminal and the report."""

from typing import NamedTuple

from loadtest.histogram import Histogram
from loadtest.run import Phase, Result

MS = 1_000
CURVE = 30
"""Max seconds of the curve that are printed. The report has all of them."""


class Figure(NamedTuple):
    """One row of a table."""

    name: str
    value: str


def of_phase(phase: Phase, result: Result) -> list[Figure]:
    """Return the figures of a phase."""
    figures = _of_connecting(phase, result) if phase.name == "connect" else _of_driving(phase)
    crowd = f"{phase.crowd_cpu / phase.seconds:.2f} cores, max {phase.behind * MS:.0f} ms late"
    return [*figures, Figure("the crowd itself", crowd)]


def _of_connecting(phase: Phase, result: Result) -> list[Figure]:
    count = phase.tally.connected
    figures = [
        Figure(
            "connected",
            f"{count + phase.warmed_up:,}: first {phase.warmed_up:,}, then {count:,} in {phase.seconds:.1f} s",
        ),
        Figure("connect to first page", spread(Histogram(phase.tally.opened))),
    ]
    if phase.cpu and count:
        figures.append(Figure("CPU per connection", f"{phase.cpu_seconds / count * MS:.2f} ms"))
        held = phase.memory.get("server", 0) - result.base_memory.get("server", 0)
        if held > 0:  # negative if the server reuses memory that it had freed
            figures.append(Figure("memory per connection", f"{held / count / 1024:.1f} KiB"))
    return figures


def _of_driving(phase: Phase) -> list[Figure]:
    tally, seconds = phase.tally, phase.load_seconds
    figures = []
    if tally.sent:
        figures.append(Figure("sent", f"{tally.sent:,} ({tally.sent / seconds:,.0f} per second)"))
        figures.append(Figure("answer, since the due time", spread(Histogram(tally.answers))))
    if tally.delivered:
        figures.append(Figure("delivered", f"{tally.delivered:,} ({tally.delivered / seconds:,.0f} per second)"))
        figures.append(Figure("delivery, since the due time", spread(Histogram(tally.deliveries))))
    if tally.ephemeral:
        figures.append(Figure("typing, presence, receipts", f"{tally.ephemeral:,}"))
    if tally.resumed:
        figures.append(Figure("reconnected", f"{tally.resumed:,}: {spread(Histogram(tally.opened))}"))
        figures.append(Figure("reconnected, each second", curve(phase)))
    if tally.deferred:
        figures.append(Figure("asked to connect later", f"{tally.deferred:,} times"))
    if phase.cpu:
        figures.append(Figure("server CPU, cores", cores(phase)))
    if phase.cpu and tally.delivered:
        figures.append(Figure("CPU per delivery", f"{phase.cpu_seconds / tally.delivered * 1e6:.1f} µs"))
    if phase.cpu and tally.sent:
        figures.append(Figure("CPU per frame sent", f"{phase.cpu_seconds / tally.sent * 1e6:.0f} µs"))
    return figures


def verdict(result: Result) -> tuple[bool, str]:
    """Return whether all events arrived once and in order and no frame was refused, and a sentence about it."""
    tallies = [phase.tally for phase in result.phases]
    if result.wrong:
        lost, twice, gaps = (sum(getattr(one, name) for one in tallies) for name in ("lost", "duplicated", "skipped"))
        return False, f"{lost:,} lost, {twice:,} duplicated, {gaps:,} skipped or out of order."
    if errors := result.errors:
        named = ", ".join(f"{error} ({count:,} times)" for error, count in errors.items())
        return False, f"No event was lost or out of order, but there were errors: {named}."
    delivered, answered = (sum(getattr(one, name) for one in tallies) for name in ("delivered", "answered"))
    if not delivered:
        return True, f"All {answered:,} answers arrived, and no frame was refused."
    return True, f"All {delivered:,} deliveries arrived once and in order, and no frame was refused."


def spread(histogram: Histogram) -> str:
    """Return the median and high percentiles, in milliseconds."""
    p50, p99, p999 = (histogram.percentile(share) * MS for share in (0.5, 0.99, 0.999))
    return f"p50 {p50:.1f}   p99 {p99:.1f}   p99.9 {p999:.1f} ms"


def curve(phase: Phase) -> str:
    """Return the number of reconnections in each second, from the first to the last with any."""
    counts = [round(moment.returned) for moment in phase.moments]
    busy = [number for number, count in enumerate(counts) if count]
    return "  ".join(f"{count:,}" for count in counts[busy[0] : busy[-1] + 1][:CURVE]) if busy else ""


def cores(phase: Phase) -> str:
    """Return the number of cores that each kind of process used."""
    return "   ".join(f"{kind} {used / phase.seconds:.2f}" for kind, used in sorted(phase.cpu.items()))
