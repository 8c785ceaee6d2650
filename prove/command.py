"""`openchat prove`: a crowd, a schedule of faults, and a table that says whether the promises held."""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Self

import msgspec
import uvloop
from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.target import Unusable
from prove import report
from prove.cluster import Cluster, OwnCluster
from prove.faults import FAULTS, Fault
from prove.proxy import Proxy
from prove.run import Outcome, Proof, Run
from server.cli.arguments import Parser, path
from server.core.atomic_file import aside, require_folder
from server.core.errors import Fatal

PHASE_SECONDS = 15.0
COLUMNS = (
    "sent", "acked", "lost", "dupli-\ncated", "out of\norder", "phan-\ntom", "wrong", "recon-\nnects", "wait\np50",
    "wait\nmax",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run `openchat prove` with these arguments; return the exit status: 1 if any promise was broken."""
    options = _parser().parse_args(arguments)
    console = Console()
    # What it started ends with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.list:
        console.print(_list())
        return 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_prove(options, console))
    except (Unusable, Fatal, TimeoutError) as error:
        sys.stderr.write(f"openchat prove: {str(error) or 'the installation does not become ready.'}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="openchat prove",
        description="Starts a cluster and a crowd that does everything the wire offers, hurts the cluster in every "
        "way of a list while the crowd acts, and compares after each what everyone saw with what is stored.",
        epilog="With --url, --database-url and --redis-url it proves an installation that is there, with those "
        "faults that need no access to its processes. It makes accounts and conversations and leaves them there: not "
        "where people chat.",
    )
    parser.add_argument("--list", action="store_true", help="say what the faults are")
    parser.add_argument("--seed", type=int, default=1, help="repeats a schedule (1)")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with more rounds for so long")
    parser.add_argument("--rate", type=float, default=100.0, help="what people do in a second, all together (100)")
    parser.add_argument("--people", type=int, default=40, help="accounts, one connection each (40)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the cluster (2)")
    parser.add_argument("--seconds", type=float, default=PHASE_SECONDS, help="for each fault at least (15)")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="faults whose names begin like this")
    parser.add_argument("--url", help="an installation that is there, instead of one of our own")
    parser.add_argument("--database-url", help="its PostgreSQL")
    parser.add_argument("--redis-url", help="its Redis or Valkey")
    parser.add_argument("--report", type=path, help="a folder for the report, as JSON and as HTML")
    return parser


def _list() -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("fault", "what happens", "needs"):
        table.add_column(column)
    for one in FAULTS:
        table.add_row(one.name, one.about, "a cluster of our own" if one.needs_processes else "")
    return table


async def _prove(options: argparse.Namespace, console: Console) -> int:
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
        # However it ends: what is known by then is worth knowing.
        if proof.outcomes:
            console.print(_table(proof.outcomes))
    return _conclude(proof, options, console)


async def _run(faults: Sequence[Fault], proof: Proof, options: argparse.Namespace, console: Console) -> None:
    with Screen(console, proof) as screen:
        screen.tell("starting a cluster …" if options.url is None else f"looking at {options.url} …")
        async with _cluster(options) as cluster, Proxy(*cluster.address) as proxy:
            run = Run(cluster, proxy, proof, tell=screen.tell, tick=screen.show)
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
            screen.tell("stopping the cluster …")


def _chosen(options: argparse.Namespace) -> list[Fault]:
    if options.url and not (options.database_url and options.redis_url):
        raise Unusable("with --url, say where its data is: --database-url and --redis-url.")
    faults = [one for one in FAULTS if not (options.url and one.needs_processes)]
    if options.only:
        wanted = tuple(one.lower() for one in options.only)
        faults = [one for one in faults if one.name.lower().startswith(wanted)]
    if not faults:
        raise Unusable("there is no such fault; --list says which there are.")
    return faults


def _cluster(options: argparse.Namespace) -> Cluster:
    if options.url:
        return Cluster(options.url, options.database_url, options.redis_url)
    return OwnCluster(options.workers)


def _schedule(faults: Sequence[Fault], seed: int) -> Iterator[Fault]:
    """Every fault in order, and then again and again in an order of the seed's."""
    yield from faults
    shuffled = list(faults)
    chance = random.Random(seed)
    while True:
        chance.shuffle(shuffled)
        yield from shuffled


def _conclude(proof: Proof, options: argparse.Namespace, console: Console) -> int:
    for outcome in proof.outcomes:
        for words in outcome.words:
            console.print(f"[red]{outcome.name}[/]: {words}", highlight=False, soft_wrap=True)
    if options.report:
        stem = options.report / f"prove-{time.strftime('%Y%m%d-%H%M%S')}"
        with aside(stem.with_suffix(".json")) as write:
            write(msgspec.json.format(msgspec.json.encode(proof)))
        with aside(stem.with_suffix(".html")) as write:
            write(report.page(proof).encode())
        console.print(f"The report is {stem.with_suffix('.html')}")
    verdict = report.verdict(proof)
    console.print(f"[bold {'green' if proof.is_good else 'red'}]{verdict}[/]", highlight=False)
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
    """The table as it grows, where there is a terminal; otherwise a line for each thing that begins."""

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

    def tell(self, what: str) -> None:
        """Say what is going on now."""
        self._now = what
        if self._console.is_terminal:
            self.show()
        else:
            self._console.print(what, highlight=False)

    def show(self) -> None:
        """Show how it goes."""
        if not self._console.is_terminal:
            return
        table = _table(self._proof.outcomes)
        table.caption = self._now
        if self._proof.moments:
            last = self._proof.moments[-1]
            table.caption += f"   {last.answers:.0f} answers a second, {last.connected} connected, "
            table.caption += f"{last.waiting:.1f} s waited for the slowest"
        self._live.update(table, refresh=True)
