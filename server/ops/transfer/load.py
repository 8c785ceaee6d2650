"""Imports rows in one transaction: all of them or none."""

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

ROWS_PER_STATEMENT = 500
REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.StatementTooComplexError)
"""Raised by PostgreSQL about rows that it does not accept."""


TAKEN = (
    "its id, its e-mail address or its pair of users exists already. Start the import again, unless the export has the "
    "row twice"
)


async def load(db: Db, lines: Lines, progress: Progress, *, is_whole: bool, deed: Deed) -> Summary:
    """Import rows in one transaction. Return how many were new, per table. With `is_whole`, the rows are a whole
    installation. `deed` is added to the server's audit log, with the number of rows.

    Raises Fatal, without an effect, if a whole installation would be imported into one with users. Raises ValueError if
    a row does not fit.
    """
    loaded: Counter[str] = Counter()
    async with db.transaction():
        await transfers.begin(db, is_snapshot=False)
        if is_whole:
            if not await transfers.is_empty(db):
                raise Fatal("the database has users already. Import a whole installation into an empty database.")
            await transfers.discard_keys(db)
        for table, group in groupby(lines, key=lambda line: line.row.table):
            while batch := list(islice(group, ROWS_PER_STATEMENT)):
                loaded[table] += await _load(db, table, batch, is_whole=is_whole)
                progress.counts(table, loaded[table])
        if not is_whole:
            await transfers.touch(db)
            if (name := await transfers.overfull(db, MAX_MEMBERSHIPS)) is not None:
                raise ValueError(f"{name} would participate in more than {MAX_MEMBERSHIPS:,} conversations")
            if await transfers.is_erased_in(db):
                raise ValueError("a user was erased during the import. Start it again")
        else:
            # Running workers sign with the previous key, and know the previous versions.
            await begin_epoch(db)
        await audit.record(db, audit.SERVER, deed._replace(details={**deed.details, "rows": loaded.total()}))
    progress.done()
    return Summary(rows=dict(loaded))


async def _load(db: Db, table: str, batch: list[RowLine], *, is_whole: bool) -> int:
    """Import some rows of a table. Return how many were new.

    Raises ValueError, with the place of the row, if one does not fit. Halving the batch finds that row.
    """
    try:
        async with db.transaction():
            rows = b",".join(bytes(line.row.row) for line in batch)
            count = await transfers.load(db, table, f"[{rows.decode()}]")
            if count != len(batch):
                raise ValueError("it conflicts with an earlier row" if is_whole else TAKEN)
            return count
    except (*REFUSED, ValueError) as error:
        half = len(batch) // 2
        if half == 0:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{batch[0].place}: this row of {table} was refused: {reason}") from error
    count = await _load(db, table, batch[:half], is_whole=is_whole)
    return count + await _load(db, table, batch[half:], is_whole=is_whole)
