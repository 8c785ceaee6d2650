"""The epoch of the database. A restore, a replacement, a promotion and `openchat new-epoch` each begin a new one.

The state of a worker, such as delivered versions, is valid in the epoch in which the worker started. So a worker
belongs to one epoch. It checks each connection before use, and exits when it finds another epoch (docs/decisions/0061).
"""

import asyncio
import logging
from typing import TypeAlias

import asyncpg

from server.core.faults import Away
from server.db.hosts import confirm

# A restored dump has the `epoch` of the original. The numbers of the PostgreSQL cluster, the database or the table
# distinguish them. `openchat new-epoch` is only needed after a copy of a cluster's files, or after replacing rows.
# `pg_control_checkpoint` would show a promotion only after the next checkpoint, which takes minutes.
EPOCH = """
SELECT pg_is_in_recovery(), left(encode(sha256(concat_ws('.', e.epoch, s.system_identifier, d.oid, e.tableoid,
    CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END)::bytea), 'hex'), 16)
FROM database_epoch e, pg_control_system() s, pg_database d WHERE d.datname = current_database()
"""
NEW = "UPDATE database_epoch SET epoch = gen_random_uuid()"
OVER_SECONDS = 1
"""Max wait of a worker for requests, for frames and for statements after the end of its epoch, in seconds each."""
OVER = "the database was restored or replaced, or has a new epoch"
UNFINISHED = "it is a standby, or is being restored"

log = logging.getLogger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Epoch:
    """The epoch of this process, which its first connection defines.

    `id` is part of each key and channel in Redis, and is sent to clients. `over` is set when a connection belongs to
    another epoch.
    """

    def __init__(self) -> None:
        self.id = ""
        self.over = asyncio.Event()

    async def enter(self, connection: Connection) -> None:
        """Check a new connection as `check` does. Return when the required standbys have all that it can see."""
        found = await _read(connection)
        await confirm(connection)
        self._compare(found)

    async def check(self, connection: Connection) -> None:
        """Check that a connection belongs to this epoch. Raises Away if it belongs to another one, and ConnectionError
        if it belongs to none. The caller must not use such a connection.
        """
        self._compare(await _read(connection))

    def _compare(self, found: str) -> None:
        self.id = self.id or found
        if found != self.id:
            if not self.over.is_set():
                log.warning("%s; this worker exits", OVER)
                self.over.set()
            raise Away(OVER)


async def epoch_id(connection: Connection) -> str:
    """Return the id of the current epoch."""
    return str(await connection.fetchval(EPOCH, column=1))


async def begin_epoch(connection: Connection) -> None:
    """Begin a new epoch, so that every client starts over, as after restoring a backup. Running workers notice it
    within seconds.
    """
    await connection.execute(NEW)


async def _read(connection: Connection) -> str:
    """Return the id of the epoch. Raises ConnectionError if the database is a standby or has no epoch yet."""
    try:
        found = await connection.fetchrow(EPOCH)
    except asyncpg.UndefinedTableError:
        found = None
    if found is None or found[0]:
        raise ConnectionError(UNFINISHED)
    return str(found[1])
