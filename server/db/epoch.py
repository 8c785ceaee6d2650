"""The epoch of the database: a restore, a replacement, a promotion and `openchat new-epoch` each begin another one.

All that a worker remembers, such as delivered versions, is true in the epoch in which the worker started. So a worker
belongs to one epoch: each of its connections is checked before it is used, and when another epoch is found, the worker
ends (docs/decisions/0061).
"""

import asyncio
import logging
from typing import TypeAlias

import asyncpg

from server.core.errors import Away

# A restored dump has its `epoch` from the original, and is told from it by the numbers of the PostgreSQL, the database
# or the table. Only a copy of the files of a PostgreSQL, or rows put in place of others, need `openchat new-epoch`.
# `pg_control_checkpoint` learns of a promotion only at the checkpoint after it, which takes minutes.
EPOCH = """
SELECT pg_is_in_recovery(), left(encode(sha256(concat_ws('.', e.epoch, s.system_identifier, d.oid, e.tableoid,
    CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END)::bytea), 'hex'), 16)
FROM database_epoch e, pg_control_system() s, pg_database d WHERE d.datname = current_database()
"""
NEW = "UPDATE database_epoch SET epoch = gen_random_uuid()"
OVER = "the database was restored or replaced, or has a new epoch"
UNFINISHED = "it is a standby, or is being restored"

log = logging.getLogger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Epoch:
    """The epoch that the first connection of this process leads to.

    `id` is part of each key and channel in Redis, and clients are told it. `over` is set when a connection leads to
    another epoch.
    """

    def __init__(self) -> None:
        self.id = ""
        self.over = asyncio.Event()

    async def check(self, connection: Connection) -> None:
        """Return if a connection leads to this epoch. Raises Away if it leads to another one, and ConnectionError if to
        none: the connection is not to be used.
        """
        found = await _read(connection)
        if found is None:
            raise ConnectionError(UNFINISHED)
        self.id = self.id or found
        if found != self.id:
            if not self.over.is_set():
                log.warning("%s; this worker exits", OVER)
                self.over.set()
            raise Away(OVER)


async def epoch_id(connection: Connection) -> str:
    """Return the id of the present epoch."""
    return str(await connection.fetchval(EPOCH, column=1))


async def begin_epoch(connection: Connection) -> None:
    """Have every client start over, as after restoring a backup. Workers that run find out within seconds."""
    await connection.execute(NEW)


async def _read(connection: Connection) -> str | None:
    """Return the id of the epoch, or None if the database is a standby or has no epoch yet."""
    try:
        found = await connection.fetchrow(EPOCH)
    except asyncpg.UndefinedTableError:
        return None
    return None if found is None or found[0] else str(found[1])
