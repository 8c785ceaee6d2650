"""New connections to PostgreSQL. During an outage few are attempted, because PostgreSQL logs each one that comes before
it is ready.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import asyncpg

from server.core.errors import Away, told
from server.core.failures import Failures

RETRY_SECONDS = 0.25
"""Min interval between two attempts to connect during an outage, in seconds."""
REFUSED = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Raised by connecting."""

log = logging.getLogger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Reconnecting:
    """Connects for each call. After a failure one call connects at a time, and all others fail with the last reason."""

    def __init__(
        self,
        connect: Callable[[Mapping[str, str]], Awaitable[Connection]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._failures = Failures(log, "connecting to PostgreSQL", clock=clock)
        self._reason: str | None = None
        self._next = 0.0
        self._is_trying = False

    async def connect(self, session: Mapping[str, str]) -> Connection:
        """Return a new connection with the settings in `session`. Raises Away if PostgreSQL cannot be reached."""
        is_retry = self._reason is not None
        if self._reason is not None:
            if self._is_trying or self._clock() < self._next:
                raise Away(self._reason)
            self._is_trying = True
        try:
            connection = await self._connect(session)
        except REFUSED as error:
            self._failures.add(error)
            self._reason, self._next = told(error), self._clock() + RETRY_SECONDS
            raise Away(self._reason) from error
        finally:
            if is_retry:
                self._is_trying = False
        self._reason = None
        if self._failures.end():
            log.info("PostgreSQL can be reached again")
        return connection
