"""`openchat prove`: runs a crowd and a schedule of faults, and prints a table of violated guarantees."""

import asyncio
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
import uvloop
from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.proxy import Proxy
from loadtest.report import write
from loadtest.target import Unusable
from prove import report
from prove.cluster import Cluster, OwnCluster
from prove.failover import FAILOVERS, PairCluster
from prove.faults import FAULTS, Fault
from prove.pairs_command import conclude, prove_pairs
from prove.run import Outcome, Proof, Run
from server.cli.arguments import Command, File, Number
from server.cli.tables import visible
from server.core.atomic_file import require_folder
from server.core.errors import Fatal
from server.core.terminal import complain

PHASE_SECONDS = 15.0
BUFFER_BYTES = 8 * 1024
"""Receive buffer toward the server, in bytes. It is small, so that the server notices a client that does not read."""
COLUMNS = (
    "sent", "acked", "lost", "dupli-\ncated", "out of\norder", "phan-\ntom", "wrong", "recon-\nnects", "wait\np50",
    "wait\nmax",
)  # fmt: skip


class Options(NamedTuple):
    """The options of `openchat prove`."""

    faults: tuple[str, ...]
    only: tuple[str, ...]
    seed: int
    minutes: float
    rate: float
    people: int
    workers: int
    seconds: float
    url: str | None
    database_url: str | None
    redis_url: str | None
    report: Path | None
    is_list: bool
    is_pairs: bool


@click.command(
    "prove",
    cls=Command,
    examples="""
        openchat prove                        # every fault once, about eight minutes
        openchat prove --list
        openchat prove worker sockets
        openchat prove --minutes 60 --seed 7 --report proof
        openchat prove --pairs
        openchat prove --pairs read mark_unread
    """,
)
@click.argument(
    "faults", nargs=-1, metavar="[FAULT]...", help="Only faults, or frames with --pairs, whose names begin with FAULT."
)
@click.option("--only", multiple=True, metavar="FAULT", help="The same, for scripts.", hidden=True)
@click.option("--pairs", "is_pairs", is_flag=True, help="Send all pairs of writing frames concurrently instead.")
@click.option("--list", "is_list", is_flag=True, help="Print the faults.")
@click.option(
    "--seed", type=Number(int, 0, 2**32), default=1, metavar="NUMBER", help="Seed of the schedule of faults. [1]"
)
@click.option(
    "--minutes",
    type=Number(float, 0, 100_000),
    default=0.0,
    metavar="MINUTES",
    help="Run more rounds for at least this time.",
)
@click.option(
    "--rate",
    type=Number(float, 0.1, 100_000),
    default=100.0,
    metavar="RATE",
    help="Actions per second, of all people. [100]",
)
@click.option(
    "--people", type=Number(int, 2, 100_000), default=40, metavar="COUNT", help="Accounts, one connection each. [40]"
)
@click.option("--workers", type=Number(int, 1, 256), default=2, metavar="COUNT", help="Workers of the cluster. [2]")
@click.option(
    "--seconds",
    type=Number(float, 0.1, 100_000),
    default=PHASE_SECONDS,
    metavar="SECONDS",
    help="Min time per fault. [15]",
)
@click.option("--url", metavar="URL", help="An existing installation, instead of a new cluster.")
@click.option("--database-url", metavar="URL", help="PostgreSQL of the existing installation.")
@click.option("--redis-url", metavar="URL", help="Redis or Valkey of the existing installation.")
@click.option("--report", type=File(), metavar="FOLDER", help="Folder for a report, as JSON and as HTML.")
def prove(**given: Any) -> int:  # noqa: ANN401 - the options
    """Inject faults into a cluster while a crowd uses it.

    After each fault, the command compares what each client received with the database. With --pairs, it sends each pair
    of writing frames concurrently, by two devices of one user and by two users, and compares after each pair.

    With --url, --database-url and --redis-url it tests an existing installation, with the faults that need no access to
    its processes. It creates accounts and conversations and leaves them there. Do not use an installation in which
    people chat.
    """
    options = Options(**given)
    console = Console()
    # Processes that it started end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.is_list:
        console.print(_list())
        return 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_prove(options, console))
    except (Unusable, Fatal, TimeoutError) as error:
        complain(str(error) or "the installation does not become ready.", "openchat prove")
        return 1
    except KeyboardInterrupt:
        return 130


def _list() -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("fault", "what happens", "needs"):
        table.add_column(column)
    for one in FAULTS + FAILOVERS:
        table.add_row(one.name, one.about, "its own cluster" if one.needs_processes else "")
    return table


async def _prove(options: Options, console: Console) -> int:
    if options.is_pairs:
        async with _cluster(options) as cluster:
            proved = await prove_pairs(cluster, options.faults + options.only, options.seed, console)
        return conclude(proved, console)
    faults = _chosen(options)
    if options.report:
        require_folder(options.report)
    proof = Proof(
        seed=options.seed, people=options.people, rate=options.rate,
        where=options.url or f"a cluster of {options.workers} workers",
    )  # fmt: skip
    try:
        await _run(faults, proof, options, console)
    finally:
        # Also after an error, because the results until then are useful.
        if proof.outcomes:
            console.print(_table(proof.outcomes))
    return _conclude(proof, options, console)


async def _run(faults: Sequence[Fault], proof: Proof, options: Options, console: Console) -> None:
    with Screen(console, proof) as screen:
        for cluster, some in _clusters(faults, options):
            await _run_on(cluster, some, proof, options, screen)


async def _run_on(cluster: Cluster, faults: Sequence[Fault], proof: Proof, options: Options, screen: "Screen") -> None:
    screen.step("starting a cluster …" if options.url is None else f"connecting to {options.url} …")
    async with cluster, Proxy(cluster.address, receive_bytes=BUFFER_BYTES) as proxy:
        run = Run(cluster, proxy, proof, step=screen.step, tick=screen.show)
        await run.prepare()
        end = time.monotonic() + options.minutes * 60
        for number, fault in enumerate(_schedule(faults, options.seed)):
            if number >= len(faults) and time.monotonic() > end:
                break
            await run.phase(fault, options.seconds)
            screen.show()
        await run.leave()
        await run.stop()
        await run.check()
        screen.step("stopping the cluster …")


def _chosen(options: Options) -> list[Fault]:
    if options.url and not (options.database_url and options.redis_url):
        raise Unusable("--url requires --database-url and --redis-url.")
    faults = [one for one in FAULTS + FAILOVERS if not (options.url and one.needs_processes)]
    if wanted := tuple(one.lower() for one in options.faults + options.only):
        faults = [one for one in faults if one.name.lower().startswith(wanted)]
    if not faults:
        raise Unusable("no fault matches. Print all with --list.")
    return faults


def _cluster(options: Options) -> Cluster:
    if options.url and options.database_url and options.redis_url:
        return Cluster(options.url, options.database_url, options.redis_url)
    return OwnCluster(options.workers)


def _clusters(faults: Sequence[Fault], options: Options) -> Iterator[tuple[Cluster, Sequence[Fault]]]:
    """Yield each cluster that the faults need, and its faults."""
    if others := [one for one in faults if one not in FAILOVERS]:
        yield _cluster(options), others
    if failovers := [one for one in faults if one in FAILOVERS]:
        yield PairCluster(options.workers), failovers


def _schedule(faults: Sequence[Fault], seed: int) -> Iterator[Fault]:
    """Yield all faults in order, and then repeatedly in random orders, which the seed determines."""
    yield from faults
    shuffled = list(faults)
    rng = random.Random(seed)
    while True:
        rng.shuffle(shuffled)
        yield from shuffled


def _conclude(proof: Proof, options: Options, console: Console) -> int:
    for outcome in proof.outcomes:
        for violation in outcome.violations:
            console.print(
                visible(f"{outcome.name}: ", "red").append_text(visible(violation, "default")), soft_wrap=True
            )
    for outcome in proof.outcomes:
        if outcome.remark:
            console.print(visible(f"{outcome.name}: {outcome.remark}"), soft_wrap=True)
    console.print(visible(str(proof.load_average.update())), soft_wrap=True)
    if options.report:
        path = write(options.report, "prove", proof, report.page(proof))
        console.print(visible(f"Report: {path}"), soft_wrap=True)
    verdict = report.verdict(proof)
    console.print(visible(verdict, f"bold {'green' if proof.is_good else 'red'}"))
    return 0 if proof.is_good else 1


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("fault")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for one in outcomes:
        table.add_row(one.name if one.is_good else f"[red]{one.name}[/]", *report.cells(one))
    return table


class Screen:
    """Shows progress: a live table on a terminal, and a line per step elsewhere."""

    def __init__(self, console: Console, proof: Proof) -> None:
        self._console = console
        self._proof = proof
        self._now = ""
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, what: str) -> None:
        """Show the current step."""
        self._now = what
        if self._console.is_terminal:
            self.show()
        else:
            self._console.print(visible(what))

    def show(self) -> None:
        """Redraw the table."""
        if not self._console.is_terminal:
            return
        table = _table(self._proof.outcomes)
        caption = self._now
        if self._proof.moments:
            last = self._proof.moments[-1]
            caption += f"   {last.answers:.0f} answers per second, {last.connected} connected, "
            caption += f"longest wait {last.waiting:.1f} s"
        table.caption = visible(caption)
        self._live.update(table, refresh=True)
