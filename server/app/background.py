"""The table of a worker's periodic jobs. Each worker runs all of them, and due work is done by one of the workers."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import NamedTuple

from server.auth.sessions import Sessions
from server.core.config import Settings
from server.core.metrics import Metrics
from server.core.periodic import end, every
from server.db.database import WRITE_SECONDS, Database
from server.domain.erasure import erase_due
from server.domain.presence import Presence
from server.hub.hub import Hub
from server.jobs.expiry import expire_due
from server.jobs.push import WebPush
from server.jobs.scheduled import Scheduler
from server.queries import approaches, audit, relationships, remains, scheduled, search_index

DUE_SECONDS = 1.0
"""Interval of jobs that users wait for, in seconds: sending, pushing and expiring messages."""
TIDY_SECONDS = 5.0
"""Interval of jobs that nobody waits for, in seconds: the search index, and what is left of deleted rows."""
EPOCH_SECONDS = 5.0
"""Interval between two checks of the database's epoch, in seconds. New connections are checked, too."""
EXPIRE_SECONDS = 15.0
"""Interval at which custom statuses expire, in seconds. Reads hide an expired status immediately."""
CLEAR_SECONDS = 600.0
"""Interval at which old rows are deleted, in seconds."""
EXPIRY_SHARE = 4
"""Max share of a worker's connections that delete expired messages, as 1 / `EXPIRY_SHARE`, but at least one."""


class Job(NamedTuple):
    """A line of the table."""

    seconds: float
    """Interval, in seconds. A run that takes longer is counted in `openchat_job_overruns_total`."""
    run: Callable[[], Awaitable[bool | None]]
    """Does all due work. Or does some of it, and returns whether there may be more."""


class Background:
    """The periodic jobs of one worker."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        hub: Hub,
        *,
        sessions: Sessions,
        presence: Presence,
        scheduler: Scheduler,
        web_push: WebPush,
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._hub = hub
        self._sessions = sessions
        self._overruns = metrics.job_overruns
        self._audit_kept = timedelta(days=settings.audit_days)
        self._grace = timedelta(days=settings.erase_after_days)
        self._expiring = max(1, settings.database_connections // EXPIRY_SHARE)
        self._marked = remains.FIRST
        self._tasks: list[asyncio.Task[None]] = []
        self.jobs = (
            Job(DUE_SECONDS, scheduler.send_due),
            Job(DUE_SECONDS, web_push.push_due),
            Job(DUE_SECONDS, self.expire_due),
            Job(TIDY_SECONDS, self.clear_remains),
            Job(TIDY_SECONDS, self.tidy),
            Job(EPOCH_SECONDS, database.check_epoch),
            Job(WRITE_SECONDS, database.check_storage),
            Job(EXPIRE_SECONDS, presence.expire_statuses),
            Job(CLEAR_SECONDS, self.clear_expired),
            Job(CLEAR_SECONDS, self.mark_remains),
            Job(CLEAR_SECONDS, self.forget_scheduled),
            Job(CLEAR_SECONDS, self.forget_relationships),
            Job(CLEAR_SECONDS, self.forget_audit),
            Job(CLEAR_SECONDS, self.erase_due),
        )

    def start(self) -> None:
        """Run each job every `seconds`, the first time after a random part of that."""
        self._tasks = [
            asyncio.create_task(every(job.seconds, job.run, is_spread=True, overruns=self._overruns))
            for job in self.jobs
        ]

    async def close(self) -> None:
        """Cancel all jobs, and return when they have ended."""
        await end(self._tasks)

    async def expire_due(self) -> None:
        """Delete messages that have expired."""
        await expire_due(self._database, self._hub, most=self._expiring)

    async def clear_remains(self) -> bool:
        """Delete some remains of deleted messages and conversations. Return whether there may be more."""
        async with self._database.connection() as db:
            is_more_due = await remains.clear(db)
            emptied = await remains.empty(db)
        self._hub.notify(emptied.user_ids)
        return is_more_due or emptied.is_more_due

    async def tidy(self) -> None:
        """Merge new entries into the search index."""
        async with self._database.connection() as db:
            await search_index.tidy(db)

    async def clear_expired(self) -> bool:
        """Delete some sessions that expired long ago, and some counts of approaches that are older than a day. Return
        whether there may be more.
        """
        is_more_due = await self._sessions.clear()
        async with self._database.connection() as db:
            return await approaches.expire(db) or is_more_due

    async def mark_remains(self) -> bool:
        """Find invitations to ended conversations. Return whether there are more to check."""
        async with self._database.connection() as db:
            self._marked = await remains.mark(db, self._marked)
        return self._marked != remains.FIRST

    async def forget_scheduled(self) -> bool:
        """Delete some scheduled messages that ended long ago. Return whether there may be more."""
        async with self._database.connection() as db:
            return await scheduled.forget(db)

    async def forget_relationships(self) -> bool:
        """Delete some relationships that ended long ago. Return whether there may be more."""
        async with self._database.connection() as db:
            return await relationships.forget(db)

    async def forget_audit(self) -> bool:
        """Delete some old entries of conversations' audit logs. Return whether there may be more."""
        async with self._database.connection() as db:
            return await audit.forget(db, self._audit_kept)

    async def erase_due(self) -> None:
        """Erase the users whose grace period is over."""
        await erase_due(self._database, self._hub, self._grace)
