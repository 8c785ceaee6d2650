"""Adds messages to the search index shortly after they are sent."""

import asyncio
import contextlib
import logging
import time

from protocol.values import Message
from server.core.failures import Failures
from server.db.database import CANCEL_SECONDS, Database
from server.queries import search_index
from server.queries.search_index import FIRST

GATHER_SECONDS = 0.2
"""Time for which messages gather after the first one, in seconds, because one statement for many costs less."""
SWEEP_SECONDS = 15.0
"""Interval at which a worker looks for messages that another worker did not add, in seconds."""

FLOOR_SECONDS = CANCEL_SECONDS + 1.0
"""Age of the `floor` in use, in seconds. A statement that was running at that time, and took its snapshot before, has
ended.
"""

log = logging.getLogger(__name__)


class SearchIndexer:
    """Adds the words of messages to the search index. Each worker adds those that it sends, and those of workers that
    were killed. The queue is in the database, and one worker takes each of its rows.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._floor = FIRST
        """Rows below it are left to the sweep. Most of them were deleted."""
        self._next_floor = FIRST
        self._next_floor_at = 0.0
        """The time from which `_next_floor` may be used, once the queue is empty."""
        self._sent = asyncio.Event()

    def enqueue(self, _message: Message) -> None:
        """Add this message soon. The queue in the database has its id."""
        self._sent.set()

    async def work(self) -> None:
        """Add messages, until cancelled."""
        failures = Failures(log, "adding messages to the search index")
        clock = asyncio.get_running_loop().time
        sweep_at = clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(sweep_at):
                    await self._sent.wait()
                    await asyncio.sleep(GATHER_SECONDS)
            self._sent.clear()
            floor = self._floor
            if clock() >= sweep_at:
                floor = FIRST
                sweep_at = clock() + SWEEP_SECONDS
            try:
                while await self._add(floor):
                    pass
                failures.end()
            except Exception as error:  # noqa: BLE001 - the next sweep tries again
                failures.add(error)

    async def _add(self, floor: str) -> bool:
        """Add some messages, from rows that are not below `floor`. Return whether there may be more."""
        async with self._database.connection() as db:
            batch = await search_index.waiting(db, floor)
        if batch.left:
            self._sent.set()
            return batch.taken > 1  # those that wait again are one row
        if not batch.taken and (now := time.monotonic()) >= self._next_floor_at:
            self._floor, self._next_floor = self._next_floor, batch.floor
            self._next_floor_at = now + FLOOR_SECONDS
        return batch.taken > 0
