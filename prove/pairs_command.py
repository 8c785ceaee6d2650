"""`openchat prove --pairs`: acts out all pairs of writing frames, and prints a table of frames."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loadtest.target import Unusable
from protocol.codec import tag
from prove.accounts import Account
from prove.cluster import Cluster
from prove.pairs import Crew, PairsProof, Run, pairs
from prove.scene import PEOPLE
from prove.writes import WRITES
from server.cli.tables import visible

CREWS = 12
"""Crews that act concurrently."""
LINE_EVERY = 100
"""Pairs per line of progress, without a terminal."""


async def prove_pairs(cluster: Cluster, names: tuple[str, ...], seed: int, console: Console) -> PairsProof:
    """Act out the pairs with frames whose names begin with one of `names`, or all. Raises Unusable if there are none,
    or if the server refuses to create accounts.
    """
    kinds = [kind for kind in WRITES if tag(kind).startswith(names)] if names else []
    if names and not kinds:
        raise Unusable("no frame matches.")
    proof = PairsProof(seed=seed)
    chosen = pairs(kinds)
    shown = (TextColumn("acting out pairs of frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))

        def tick() -> None:
            progress.advance(task)
            if not console.is_terminal and proof.pairs % LINE_EVERY == 0:
                console.print(visible(f"acted out {proof.pairs:,} of {len(chosen):,} pairs …"))

        async def new_crew() -> Crew:
            accounts = [await Account.register(cluster.url, name) for name in PEOPLE]
            return Crew(accounts, [cluster.url], seed)

        await Run(chosen, proof).act(CREWS, new_crew, connect=cluster.database, tick=tick)
    for line in await cluster.check():
        if not line.is_good:
            proof.violations.append(f"{line.check}: {', '.join(line.some or ())}")
    return proof


def conclude(proof: PairsProof, console: Console) -> int:
    """Print the results. Return the exit status."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("frame")
    for column in ("done", "refused"):
        table.add_column(column, justify="right")
    for name, tried in sorted(proof.tried.items()):
        table.add_row(name, f"{tried.done:,}", f"{tried.refused:,}")
    console.print(table)
    for one in proof.violations:
        console.print(visible(one, "red"), soft_wrap=True)
    verdict = f"{proof.pairs:,} pairs were acted out, {proof.late:,} of them corrected by a comparison. "
    verdict += "All devices had the state of the rows." if proof.is_good else "Devices differed from the rows."
    console.print(visible(verdict, f"bold {'green' if proof.is_good else 'red'}"))
    return 0 if proof.is_good else 1
