"""Whether a worker is ready. Requests within a second share one check of the database, which also tells whether
PostgreSQL can store anything.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import asyncpg

CHECK_SECONDS = 1.0
"""Min interval between the starts of two checks, in seconds. Probes need no account and have no rate limit."""

IS_WRITABLE = "SELECT current_setting('transaction_read_only') = 'off'"
# 64 KB of noise need new pages, so that a full disk refuses them.
WRITE = """
INSERT INTO server_key (name, value)
SELECT 'nothing', string_agg(md5(random()::text), '') FROM generate_series(1, 2000)
"""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def is_writable(connection: Connection) -> bool:
    """Whether PostgreSQL accepts writing statements. A standby and a read-only database do not."""
    return bool(await connection.fetchval(IS_WRITABLE))


async def write_nothing(connection: Connection) -> None:
    """Write new pages, and roll that back. Raises the error of PostgreSQL if it cannot store them."""
    written = connection.transaction()
    await written.start()
    try:
        await connection.execute(WRITE)
    finally:
        await written.rollback()


class Readiness:
    """Shares each check among concurrent callers."""

    def __init__(self, check: Callable[[], Awaitable[bool]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._began = 0.0
        self._checking: asyncio.Task[bool] | None = None

    async def is_given(self) -> bool:
        """Return the result of the last check if it began less than `CHECK_SECONDS` ago. Otherwise return that of a new
        one.
        """
        if self._checking is None or (self._checking.done() and self._clock() - self._began >= CHECK_SECONDS):
            self._began = self._clock()
            self._checking = asyncio.ensure_future(self._check())
        # A caller that disconnects must not cancel the check of the others.
        return await asyncio.shield(self._checking)
