"""New connections to PostgreSQL. During an outage few are attempted, because PostgreSQL logs each one that comes before
it is ready.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import asyncpg

from server.core.errors import told
from server.core.faults import LOST_STATE, OVER, Away, Fault, fault_of, log_fault
from server.db.hosts import REFUSED

RETRY_SECONDS, RETRY_MOST_SECONDS = 0.25, 2.0
"""Min interval between two attempts to connect during an outage, in seconds. It doubles up to the second number."""

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
        # The last failure, unless a later attempt succeeded.
        self._away: Away | None = None
        self._pause = RETRY_SECONDS
        self._next = 0.0
        self._is_trying = False

    async def connect(self, session: Mapping[str, str]) -> Connection:
        """Return a new connection with the settings in `session`. Raises Away if PostgreSQL cannot be reached."""
        is_retry = self._away is not None
        if self._away is not None:
            if self._is_trying or self._clock() < self._next:
                raise Away(str(self._away), self._away.fault)
            self._is_trying = True
        try:
            connection = await self._connect(session)
        except REFUSED as error:
            self._away = self._failed(error, is_retry=is_retry)
            raise Away(str(self._away), self._away.fault) from error
        finally:
            if is_retry:
                self._is_trying = False
        if self._away is not None:
            was, self._away = self._away.fault, None
            if was is Fault.LOST:
                log.info("PostgreSQL can be reached again", extra={OVER: LOST_STATE})
        return connection

    def _failed(self, error: Exception, *, is_retry: bool) -> Away:
        fault = fault_of(error) or Fault.LOST
        log_fault(log, "connecting to PostgreSQL", error, fault=fault)
        self._pause = min(2 * self._pause, RETRY_MOST_SECONDS) if is_retry else RETRY_SECONDS
        self._next = self._clock() + self._pause
        return Away(told(error), fault)
