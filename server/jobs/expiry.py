"""Expiry: deletes messages after the lifetime that their conversation's settings define."""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence

from asyncpg import LockNotAvailableError

from protocol.ids import ConversationId, UserId
from server.context import Events
from server.core.errors import log_failure
from server.core.faults import is_lost
from server.db.database import Database, Db
from server.domain.publish import publish_deleted
from server.queries import expiry
from server.queries.expiry import PORTION, PORTION_BYTES, Due, Expired

log = logging.getLogger(__name__)


async def expire_due(database: Database, events: Events, *, most: int = 1) -> None:
    """Delete expired messages, and publish that. Any worker may run this, and one of them deletes each message. Senders
    take turns, so that no sender's messages wait for all those of another.

    Up to `most` statements run concurrently, each on a connection and for other conversations. A conversation that
    fails, or whose lock takes too long, is left to a later run. Raises the errors of the query for due messages,
    because without a database the run ends.
    """
    run = _Run(database, events)
    served: set[UserId] = set()
    while True:
        async with database.connection() as db:
            due = await expiry.due(db, run.failed, served)
        if not due and not served:
            return
        if not due:
            served.clear()
        served |= {one.sender_id for one in due}
        portions = _Portions(due)
        async with asyncio.TaskGroup() as group:
            for _ in range(most):
                group.create_task(run.expire(portions))


class _Portions:
    """Due messages, which are taken in portions for `expiry.expire`. No two portions that are taken at the same time
    have messages of the same conversation.
    """

    def __init__(self, due: Sequence[Due]) -> None:
        self._due: dict[ConversationId, deque[Due]] = {}
        self._taken: set[ConversationId] = set()
        for one in due:
            self._due.setdefault(one.conversation_id, deque()).append(one)

    def take(self, failed: Collection[ConversationId]) -> list[Due]:
        """Return a portion without conversations that have failed. Return an empty list if the conversations that are
        left are taken.
        """
        portion: list[Due] = []
        size = 0
        for conversation_id, due in self._due.items():
            if conversation_id in self._taken or conversation_id in failed:
                continue
            while due and (not portion or (len(portion) < PORTION and size + due[0].size <= PORTION_BYTES)):
                portion.append(due.popleft())
                size += portion[-1].size
            if due:
                break
        self._taken.update(one.conversation_id for one in portion)
        return portion

    def give_back(self, portion: Sequence[Due]) -> None:
        """Let other portions have messages of these conversations."""
        self._taken.difference_update(one.conversation_id for one in portion)

    def drop(self) -> None:
        """Drop the messages that were not taken."""
        self._due.clear()


class _Run:
    """A run of `expire_due`."""

    def __init__(self, database: Database, events: Events) -> None:
        self._database = database
        self._events = events
        self._planned: set[Db] = set()
        """The connections that have planned the statements of `expiry.expire`."""
        self.failed: set[ConversationId] = set()
        """Conversations that are left to a later run."""

    async def expire(self, portions: _Portions) -> None:
        """Delete messages, one portion after the other, until none is left that no other task has taken."""
        while portion := portions.take(self.failed):
            if not await self._expire_portion(portion):
                portions.drop()  # the query for due messages tells a lost database from a slow statement
            portions.give_back(portion)

    async def _expire_portion(self, portion: Sequence[Due]) -> bool:
        """Delete messages, and add the conversations of those that were not deleted to `failed`. Return False if the
        database may be lost.
        """
        conversation_ids, failure = await self._expire_together(portion)
        for conversation_id in conversation_ids:
            alone = [one for one in portion if one.conversation_id == conversation_id]
            try:
                await self._expire(alone, passes_held=False)
            except LockNotAvailableError:
                self.failed.add(conversation_id)
                if failure is not None:  # that statement may still hold the lock
                    log_failure(log, f"expiry in {conversation_id}", failure)
            except Exception as error:  # noqa: BLE001 - the other conversations are due, too
                log_failure(log, f"expiry in {conversation_id}", error)
                self.failed.add(conversation_id)
                if is_lost(error):
                    return False
        return True

    async def _expire_together(self, portion: Sequence[Due]) -> tuple[Collection[ConversationId], Exception | None]:
        """Delete messages of several conversations, without waiting for locks. Return the conversations that it passed
        over, and the error if it failed for all of them.
        """
        conversation_ids = {one.conversation_id for one in portion}
        if len(conversation_ids) == 1:
            return conversation_ids, None
        try:
            return await self._expire(portion, passes_held=True), None
        except Exception as error:  # noqa: BLE001 - one of them fails, and the caller finds it
            return conversation_ids, error

    async def _expire(self, portion: Sequence[Due], *, passes_held: bool) -> Collection[ConversationId]:
        """Delete messages, and publish that. Return the conversations that were held."""
        if edited := [one for one in portion if one.has_edits]:
            async with self._database.connection() as db:
                while await expiry.forget_edits(db, edited):
                    pass

        async def once() -> Expired:
            async with self._database.connection() as db:
                if db not in self._planned:
                    await expiry.plan(db)
                    self._planned.add(db)
                return await expiry.expire(db, portion, passes_held=passes_held)

        expired = await self._database.again("expiry", once)
        for deleted in expired.deleted:
            publish_deleted(self._events, deleted)
        return expired.held
