"""Bringing rows in: all of them, or none."""

from collections import Counter
from itertools import groupby, islice

import asyncpg

from protocol.limits import MAX_MEMBERSHIPS
from server.core.errors import Fatal
from server.db.database import Db
from server.db.epoch import begin_epoch
from server.ops.progress import Progress
from server.ops.transfer.lines import Lines, RowLine, Summary
from server.queries import audit, transfers
from server.queries.audit import Deed

AT_ONCE = 500
REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.StatementTooComplexError)
"""What PostgreSQL raises about rows that it does not take."""


TAKEN = "its id, its address or its pair is taken; unless the export has it twice, start the import once more"


async def load(db: Db, lines: Lines, progress: Progress, *, is_whole: bool, deed: Deed) -> Summary:
    """Bring rows in, in one transaction; return how many of each table were not there before. With `is_whole`, they are
    a whole installation. `deed` is noted with them in the server's audit log, with how many rows came.

    Raises Fatal, and brings in nothing, if that is to come where somebody is already; ValueError if
    it does not all fit.
    """
    loaded: Counter[str] = Counter()
    async with db.transaction():
        await transfers.begin(db, is_snapshot=False)
        if is_whole:
            if not await transfers.is_empty(db):
                raise Fatal("there are users here already; a whole installation is brought into an empty one.")
            await transfers.discard_keys(db)
        for table, group in groupby(lines, key=lambda line: line.row.table):
            while batch := list(islice(group, AT_ONCE)):
                loaded[table] += await _load(db, table, batch, is_whole=is_whole)
                progress.counts(table, loaded[table])
        if not is_whole:
            await transfers.touch(db)
            if (name := await transfers.overfull(db, MAX_MEMBERSHIPS)) is not None:
                raise ValueError(f"{name} would take part in more than {MAX_MEMBERSHIPS:,} conversations")
            if await transfers.is_erased_in(db):
                raise ValueError("somebody was erased meanwhile; start it once more")
        else:
            # Workers that run sign with the key of before, and know the clocks of before.
            await begin_epoch(db)
        await audit.record(db, audit.SERVER, deed._replace(details={**deed.details, "rows": loaded.total()}))
    progress.done()
    return Summary(rows=dict(loaded))


async def _load(db: Db, table: str, batch: list[RowLine], *, is_whole: bool) -> int:
    """Bring some rows of a table in; return how many were not there before.

    Raises ValueError, with the place of the row, if one does not fit: it is looked for by halving.
    """
    try:
        async with db.transaction():
            rows = b",".join(bytes(line.row.row) for line in batch)
            count = await transfers.load(db, table, f"[{rows.decode()}]")
            if count != len(batch):
                raise ValueError("it contradicts a row before it" if is_whole else TAKEN)
            return count
    except (*REFUSED, ValueError) as error:
        half = len(batch) // 2
        if half == 0:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{batch[0].place}: this row of {table} is refused: {reason}") from error
    count = await _load(db, table, batch[:half], is_whole=is_whole)
    return count + await _load(db, table, batch[half:], is_whole=is_whole)
