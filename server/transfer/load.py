"""Bringing rows in: all of them, or none."""

from collections import Counter
from itertools import groupby

from server.database import Db
from server.errors import Fatal
from server.progress import Progress
from server.queries import transfers
from server.transfer.lines import Lines, Summary

AT_ONCE = 500


async def load(db: Db, lines: Lines, progress: Progress, *, is_whole: bool) -> Summary:
    """Bring rows in, in one transaction; return how many of each table were not there before. With `is_whole`, they are
    a whole installation.

    Raises Fatal, and brings in nothing, if that is to come where somebody is already, or does not all fit.
    """
    loaded: Counter[str] = Counter()
    async with db.transaction():
        await transfers.begin(db, is_snapshot=False)
        if is_whole:
            if not await transfers.is_empty(db):
                raise Fatal("there are users here already; a whole installation is brought into an empty one.")
            await transfers.discard_keys(db)
        for table, group in groupby(lines, key=lambda line: line.table):
            batch: list[bytes] = []
            for line in group:
                batch.append(bytes(line.row))
                if len(batch) == AT_ONCE:
                    loaded[table] += await _load(db, table, batch, is_whole=is_whole)
                    progress.counts(table, loaded[table])
                    batch = []
            if batch:
                loaded[table] += await _load(db, table, batch, is_whole=is_whole)
        if not is_whole:
            await transfers.touch(db)
    progress.done()
    return Summary(rows=dict(loaded))


async def _load(db: Db, table: str, batch: list[bytes], *, is_whole: bool) -> int:
    count = await transfers.load(db, table, (b"[" + b",".join(batch) + b"]").decode())
    if is_whole and count != len(batch):
        raise Fatal(f"{len(batch) - count} rows of {table} contradict others. Nothing was brought in.")
    return count
