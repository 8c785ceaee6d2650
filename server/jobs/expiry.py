"""Expiry: deletes messages after the lifetime that their conversation's settings define."""

import logging
from collections.abc import Collection, Iterator, Sequence

from asyncpg import LockNotAvailableError

from protocol.ids import ConversationId, UserId
from server.context import Events
from server.core.errors import log_failure
from server.core.faults import is_lost
from server.db.database import Database
from server.domain.publish import publish_deleted
from server.queries import expiry
from server.queries.expiry import PORTION, PORTION_BYTES, Due, Expired

log = logging.getLogger(__name__)


async def expire_due(database: Database, events: Events) -> None:
    """Delete expired messages, and publish that. Any worker may run this, and one of them deletes each message. Senders
    take turns, so that no sender's messages wait for all those of another.

    A conversation that fails, or whose lock takes too long, is left to a later run. Raises the errors of the query for
    due messages, because without a database the run ends.
    """
    failed: set[ConversationId] = set()
    served: set[UserId] = set()
    while True:
        async with database.connection() as db:
            due = await expiry.due(db, failed, served)
        if not due and not served:
            return
        if not due:
            served.clear()
        served |= {one.sender_id for one in due}
        for portion in _portions(due, failed):
            if not await _expire_portion(database, events, portion, failed):
                break  # the query for due messages tells a lost database from a slow statement


def _portions(due: Sequence[Due], failed: Collection[ConversationId]) -> Iterator[list[Due]]:
    """Yield messages in portions for `expire`. Those of conversations that have failed by then are left out."""
    portion: list[Due] = []
    size = 0
    for one in due:
        if portion and (len(portion) == PORTION or size + one.size > PORTION_BYTES):
            yield portion
            portion, size = [], 0
        if one.conversation_id not in failed:
            portion.append(one)
            size += one.size
    if portion:
        yield portion


async def _expire_portion(
    database: Database, events: Events, portion: Sequence[Due], failed: set[ConversationId]
) -> bool:
    """Delete messages, and add the conversations of those that were not deleted to `failed`. Return False if the
    database may be lost.
    """
    conversation_ids, failure = await _expire_together(database, events, portion)
    for conversation_id in conversation_ids:
        alone = [one for one in portion if one.conversation_id == conversation_id]
        try:
            await _expire(database, events, alone, passes_held=False)
        except LockNotAvailableError:
            failed.add(conversation_id)
            if failure is not None:  # that statement may still hold the lock
                log_failure(log, f"expiry in {conversation_id}", failure)
        except Exception as error:  # noqa: BLE001 - the other conversations are due, too
            log_failure(log, f"expiry in {conversation_id}", error)
            failed.add(conversation_id)
            if is_lost(error):
                return False
    return True


async def _expire_together(
    database: Database, events: Events, portion: Sequence[Due]
) -> tuple[Collection[ConversationId], Exception | None]:
    """Delete messages of several conversations, without waiting for locks. Return the conversations that it passed
    over, and the error if it failed for all of them.
    """
    conversation_ids = {one.conversation_id for one in portion}
    if len(conversation_ids) == 1:
        return conversation_ids, None
    try:
        return await _expire(database, events, portion, passes_held=True), None
    except Exception as error:  # noqa: BLE001 - one of them fails, and the caller finds it
        return conversation_ids, error


async def _expire(
    database: Database, events: Events, portion: Sequence[Due], *, passes_held: bool
) -> Collection[ConversationId]:
    """Delete messages, and publish that. Return the conversations that were held."""
    if edited := [one for one in portion if one.has_edits]:
        async with database.connection() as db:
            while await expiry.forget_edits(db, edited):
                pass

    async def once() -> Expired:
        async with database.connection() as db:
            return await expiry.expire(db, portion, passes_held=passes_held)

    expired = await database.again("expiry", once)
    for deleted in expired.deleted:
        publish_deleted(events, deleted)
    return expired.held
