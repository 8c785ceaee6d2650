"""`openchat load`: runs a load test, shows its progress, and writes a report."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from loadtest import figures, report
from loadtest.bystander import FAULTS, Bystander, Comparison, Row
from loadtest.counters import Tally
from loadtest.histogram import Histogram
from loadtest.progress import Progress
from loadtest.run import Moment, Phase, Result, Run
from loadtest.scenario import Size
from loadtest.scenarios import SCENARIOS
from loadtest.target import OpenChat, Unusable
from server.cli.arguments import Command, File, Number, OneOf
from server.cli.tables import visible
from server.core.atomic_file import require_folder
from server.core.errors import Fatal
from server.core.terminal import complain

MS = 1_000
STEP = 1.5
"""Factor between the rates of two steps of --find-limit."""
BISECTIONS = 3
"""Number of bisections of the last step after the bound was exceeded."""
STEP_SECONDS = 6.0
DEFAULT_URL = "http://127.0.0.1:8000"
DELAYS = (0.0, 2.0, 10.0)
"""Round trips to PostgreSQL that `bystander` adds by default, in milliseconds."""
COUNT = Number(int, 1, 1_000_000)
RATE = Number(float, 0.01, 1_000_000)
SECONDS = Number(float, 0.1, 1_000_000)
COUNT_SECONDS = 5.0
"""Min interval between two counts in an output that is not a terminal, in seconds."""
MIN_ANSWERED = 0.97
"""Min share of the offered frames that a server must answer. With less it is too slow, whatever the percentiles are."""


class Options(NamedTuple):
    """The options of `openchat load`."""

    scenario: str
    url: str | None
    rate: float | None
    seconds: float
    people: int | None
    connections: int | None
    group: int | None
    messages: int
    only: tuple[str, ...]
    database_delay: tuple[float, ...]
    workers: int
    processes: int
    bound: float
    report: Path
    is_list: bool
    is_limit_wanted: bool


@click.command(
    "load",
    cls=Command,
    examples="""
        openchat load --list
        openchat load teams
        openchat load room --rate 100 --seconds 60
        openchat load teams --find-limit
        openchat load bystander --database-delay 2 --only reactions
    """,
)
@click.argument(
    "scenario", type=OneOf(list(SCENARIOS)), default="teams", metavar="[SCENARIO]", help="Scenario to run. [teams]"
)
@click.option("--list", "is_list", is_flag=True, help="Print the scenarios.")
@click.option("--url", help=f"The server. [{DEFAULT_URL}]", metavar="URL")
@click.option("--rate", type=RATE, metavar="RATE", help="Actions per second, independent of the server's speed.")
@click.option("--seconds", type=SECONDS, default=20.0, metavar="SECONDS", help="Duration. [20]")
@click.option("--people", type=COUNT, metavar="COUNT", help="Accounts.")
@click.option("--connections", type=COUNT, metavar="COUNT", help="Connections, if not one per account.")
@click.option("--group", type=COUNT, metavar="COUNT", help="People in each conversation.")
@click.option(
    "--messages", type=Number(int, 1, 1_000_000_000), default=1_000_000, metavar="COUNT",
    help="Length of the conversation of `history`. [1000000]",
)  # fmt: skip
@click.option(
    "--only", multiple=True, metavar="FAULT", help="For `bystander`: only faults whose names begin with FAULT."
)
@click.option(
    "--database-delay", type=Number(float, 0, 1_000), multiple=True, metavar="MS",
    help="For `bystander`: round trip to PostgreSQL, in milliseconds. [0, 2 and 10]",
)  # fmt: skip
@click.option("--workers", type=Number(int, 1, 256), default=1, metavar="COUNT", help="For `bystander`: workers. [1]")
@click.option(
    "--processes", type=Number(int, 1, 256), default=os.cpu_count() or 1, metavar="COUNT",
    help="Processes of the crowd. [one per core]",
)  # fmt: skip
@click.option("--find-limit", "is_limit_wanted", is_flag=True, help="Raise the rate until p99 exceeds --bound.")
@click.option(
    "--bound", type=Number(float, 1, 1_000_000), default=250.0, metavar="MS",
    help="Max p99 for --find-limit, in milliseconds. [250]",
)  # fmt: skip
@click.option(
    "--report", type=File(), default=Path("load-report"), metavar="FOLDER", help="Folder for the report. [load-report]"
)
def load(**given: Any) -> int:  # noqa: ANN401 - the options
    """Run a load test against a server and check every delivery.

    The server limits each user to 50 writing frames a second, and each address to 100 accounts in five minutes. The
    clients respect these limits, and on loopback they use many addresses. Their accounts are kept for the next run.
    """
    options = Options(**given)
    console = Console()
    if options.is_list:
        console.print(_list())
        return 0
    try:
        return asyncio.run(_load(options, console))
    except (Unusable, Fatal) as error:
        complain(error, "openchat load")
        return 1
    except KeyboardInterrupt:
        return 130


def _list() -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("scenario", "what happens", "at"):
        table.add_column(column)
    for one in SCENARIOS.values():
        table.add_row(one.name, one.about, f"{one.rate:,.0f} {one.unit} per second" if one.rate else "")
    return table


async def _load(options: Options, console: Console) -> int:
    scenario = SCENARIOS[options.scenario]
    people = options.people or scenario.people
    connections = options.connections or (people if options.people else scenario.connections or people)
    size = Size(
        people=people,
        connections=connections,
        group=min(people, options.group or scenario.group),
        rate=scenario.rate if options.rate is None else options.rate,
        messages=options.messages,
    )
    require_folder(options.report)
    if scenario.name == "bystander":
        return await _bystander(options, size, console)
    target = OpenChat(options.url or DEFAULT_URL)
    with Screen(console) as screen:
        try:
            async with Run(target, scenario.name, size, processes=options.processes, progress=screen) as run:
                await run.connect()
                if scenario.name == "history":
                    await _write_history(run, target, size.messages, screen)
                if options.is_limit_wanted:
                    await find_limit(run, size.rate or 100.0, options.bound / MS)
                elif scenario.name != "storm":
                    await run.drive(options.seconds, size.rate)
                result = run.result
        finally:
            screen.step("leaving …")
            await target.leave()
    return _conclude(result, options, console)


async def _bystander(options: Options, size: Size, console: Console) -> int:
    if options.url:
        raise Unusable("`bystander` starts an installation of its own. Leave out --url.")
    wanted = tuple(one.lower() for one in options.only)
    faults = [one for one in FAULTS if not wanted or one.name.startswith(wanted)]
    if not faults:
        raise Unusable(f"no fault matches. Choose from: {', '.join(one.name for one in FAULTS)}.")
    with Screen(console) as screen:
        run = Bystander(faults, size=size, seconds=options.seconds, workers=options.workers, progress=screen)
        screen.above = lambda: _comparison(run.rows)
        try:
            compared = await run.run(options.database_delay or DELAYS)
        finally:
            screen.step("stopping …")
            if run.rows:
                # Also after an error, because the results until then are useful.
                console.print(_comparison(run.rows))
    console.print(visible(str(compared.strangers.load_average)), soft_wrap=True)
    _write(compared, compared.strangers, options, console)
    is_good, sentence = figures.verdict(compared.strangers)
    console.print(visible(sentence, f"bold {'green' if is_good else 'red'}"))
    return 0 if is_good else 1


def _comparison(rows: list[Row]) -> Table:
    """Return the table of `bystander`: latencies of strangers, and as multiples of those without a fault."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("database", "fault"):
        table.add_column(column, no_wrap=True)
    for column in ("send p50", "p99", "history p50", "p99", "refused"):
        table.add_column(column, justify="right")
    table.add_column("the hot party")
    for row in rows:
        quiet = next(one for one in rows if one.delay == row.delay and not one.fault)
        cells = []
        for span, base in ((row.send, quiet.send), (row.history, quiet.history)):
            for value, usual in ((span.p50, base.p50), (span.p99, base.p99)):
                ratio = f" ({value / usual:.1f} x)" if row.fault and usual else ""
                cells.append(f"{value:,.1f} ms{ratio}")
        table.add_row(f"{row.delay:g} ms", row.fault or "quiet", *cells, f"{row.refused:,}", _reached(row))
    return table


def _reached(row: Row) -> str:
    parts = [row.reached] if row.reached else []
    if row.offered:
        parts.append(f"{row.answered:,.0f} of {row.offered:,.0f}/s answered")
    return ", ".join([*parts, *(f"{count:,} {code}" for code, count in row.errors.items())])


async def _write_history(run: Run, target: OpenChat, count: int, screen: "Screen") -> None:
    """Write the missing messages of the long conversation, which is kept between runs."""
    about = str(target.cache.history)
    async for written in run.fill(about, target.cache.written, count):
        target.cache.written = written
        target.save()
        screen.count("writing the conversation", written, count)


async def find_limit(run: Run, rate: float, bound: float, *, seconds: float = STEP_SECONDS) -> None:
    """Raise the rate until the server exceeds `bound`, in seconds, then bisect between the last two rates."""
    good, bad = 0.0, 0.0
    while not bad or (bad - good) / bad > (STEP - 1) / 2**BISECTIONS:
        phase = await run.drive(seconds, rate)
        if is_sustained(phase, bound):
            good, rate = rate, rate * STEP if not bad else (rate + bad) / 2
        else:
            bad, rate = rate, (good + rate) / 2
        run.progress.step(f"{phase.rate:,.0f} per second: p99 {slowest(phase) * MS:.0f} ms")
        if bad and good < 1:
            return


def is_sustained(phase: Phase, bound: float) -> bool:
    """Return whether the server sustained the rate of a step of --find-limit."""
    tally = phase.tally
    return (
        slowest(phase) <= bound and tally.answered >= tally.sent * MIN_ANSWERED and not tally.wrong and not tally.errors
    )


def best(result: Result, bound: float) -> Phase | None:
    """Return the step of --find-limit with the highest sustained rate, or None."""
    fine = (phase for phase in result.phases[1:] if is_sustained(phase, bound))
    return max(fine, key=lambda phase: phase.rate, default=None)


def slowest(phase: Phase) -> float:
    """Return the p99 of a step's deliveries, in seconds, or of its answers if the scenario has no deliveries."""
    return Histogram(phase.tally.deliveries or phase.tally.answers).percentile(0.99)


def _conclude(result: Result, options: Options, console: Console) -> int:
    bound = options.bound / MS if options.is_limit_wanted else None
    console.print(_tables(result, bound))
    is_good, sentence = figures.verdict(result)
    if bound is not None:
        # The last steps exceed the limit on purpose, so only lost, duplicated and reordered events are failures.
        is_good = not result.wrong
        ceiling = best(result, bound)
        if ceiling is None:
            console.print(f"The server did not sustain {result.phases[1].rate:,.0f} per second, the first rate.")
        else:
            delivered = ceiling.tally.delivered / ceiling.load_seconds
            console.print(
                f"[bold]Limit: {ceiling.rate:,.0f} per second, {delivered:,.0f} deliveries per second, "
                f"with p99 at {slowest(ceiling) * MS:.0f} ms[/] (bound {options.bound:.0f} ms)."
            )
    console.print(visible(str(result.load_average)), soft_wrap=True)
    _write(result, result, options, console)
    console.print(visible(sentence, f"bold {'green' if is_good else 'red'}"))
    return 0 if is_good else 1


def _write(result: Result | Comparison, plotted: Result, options: Options, console: Console) -> None:
    path = report.write(options.report, plotted.scenario, result, report.page(plotted))
    console.print(visible(f"Report: {path}"), soft_wrap=True)


def _tables(result: Result, bound: float | None) -> Table:
    table = Table(
        box=None, header_style="bold", title=visible(f"{result.scenario} at {result.where}"), title_justify="left"
    )
    if bound is not None:
        for column in ("offered/s", "sent/s", "delivered/s", "p50 ms", "p99 ms", "CPU µs/delivery", ""):
            table.add_column(column, justify="right")
        for phase in result.phases[1:]:
            tally, seconds = phase.tally, phase.load_seconds
            spans = Histogram(tally.deliveries or tally.answers)
            table.add_row(
                f"{phase.rate:,.0f}", f"{tally.sent / seconds:,.0f}", f"{tally.delivered / seconds:,.0f}",
                f"{spans.percentile(0.5) * MS:.1f}", f"{spans.percentile(0.99) * MS:.1f}",
                f"{phase.cpu_seconds / tally.delivered * 1e6:.1f}" if phase.cpu and tally.delivered else "",
                "[green]sustained[/]" if is_sustained(phase, bound) else "[red]exceeded[/]",
            )  # fmt: skip
        return table
    table.add_column("")
    table.add_column("")
    for phase in result.phases:
        table.add_row(f"[bold]{phase.name}[/]", "")
        for figure in figures.of_phase(phase, result):
            table.add_row(visible(f"  {figure.name}"), visible(figure.value))
    return table


class Screen(Progress):
    """The live view."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=4)
        self.above: Callable[[], Table] | None = None
        """Returns the results until now, which are shown above the current figures."""
        self._next_count = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, text: str) -> None:
        """Show the current step."""
        self._live.update(visible(text, "dim"))
        if not self._console.is_terminal:
            self._console.print(visible(text))

    def count(self, what: str, done: int, total: int) -> None:
        """Show how much of a long step is done."""
        if self._console.is_terminal or time.monotonic() >= self._next_count or done == total:
            self._next_count = time.monotonic() + COUNT_SECONDS
            self.step(f"{what}: {done:,} of {total:,} …")

    def update(self, phase: str, moment: Moment, total: Tally) -> None:
        """Show the figures of the last second."""
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "[bold]" + phase, f"{moment.at:.0f} s", f"{total.connected:,} connected" if total.connected else ""
        )
        table.add_row(
            "sent",
            f"{moment.sent:,.0f}/s",
            f"answer p50 {moment.answer_p50 * MS:.1f}  p99 {moment.answer_p99 * MS:.1f} ms",
        )
        table.add_row(
            "delivered",
            f"{moment.delivered:,.0f}/s",
            f"p50 {moment.delivery_p50 * MS:.1f}  p99 {moment.delivery_p99 * MS:.1f} ms",
        )
        if moment.cpu:
            table.add_row(
                "server",
                f"{sum(moment.cpu.values()):.2f} cores",
                "  ".join(f"{k} {v:.2f}" for k, v in sorted(moment.cpu.items())),
            )
        if total.wrong:
            table.add_row("[bold red]wrong", f"[bold red]{total.wrong:,}", "[red]lost, duplicated or out of order")
        for error, count in total.errors.items():
            table.add_row("[red]errors", f"[red]{count:,}", visible(error, "red"))
        self._live.update(table if self.above is None else Group(self.above(), table))
