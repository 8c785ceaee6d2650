"""Expiry: deletes messages after the lifetime that their conversation's settings define."""

import logging
from functools import partial

from asyncpg import LockNotAvailableError

from protocol.ids import ConversationId, MessageId, UserId
from server.context import Events
from server.core.errors import log_failure
from server.core.faults import is_lost
from server.db.database import Database, Db
from server.domain.publish import publish_deleted
from server.queries import conversations, edits, expiry
from server.queries.edits import Deleted

log = logging.getLogger(__name__)


async def expire_due(database: Database, events: Events) -> None:
    """Delete expired messages, and publish that. Any worker may run this, and one of them deletes each message. Senders
    take turns, so that no sender's messages wait for all those of another.

    A conversation that fails, or whose lock takes too long, is left to a later run. Raises the errors of the query for
    due messages, because without a database the run ends.
    """
    database = database.of_jobs()
    failed: set[ConversationId] = set()
    served: set[UserId] = set()
    while True:
        async with database.connection() as db:
            due = await expiry.due(db, failed, served)
        if not due and not served:
            return
        if not due:
            served.clear()
        for (sender_id, conversation_id), message_ids in due.items():
            served.add(sender_id)
            if conversation_id in failed:
                continue
            try:
                await _expire(database, events, conversation_id, message_ids)
            except LockNotAvailableError:
                failed.add(conversation_id)
            except Exception as error:  # noqa: BLE001 - the other conversations are due, too
                log_failure(log, f"expiry in {conversation_id}", error)
                failed.add(conversation_id)
                if is_lost(error):
                    break  # the query for due messages tells a lost database from a slow statement


async def _expire(
    database: Database, events: Events, conversation_id: ConversationId, message_ids: list[MessageId]
) -> None:
    """Delete messages in portions, so that other frames get the conversation's lock in between."""
    for start in range(0, len(message_ids), expiry.PORTION):
        portion = message_ids[start : start + expiry.PORTION]
        async with database.connection() as db:
            while await expiry.forget_edits(db, conversation_id, portion):
                pass
        for deleted in await database.atomically("expiry", partial(_expire_portion, conversation_id, portion)):
            publish_deleted(events, deleted)


async def _expire_portion(conversation_id: ConversationId, message_ids: list[MessageId], db: Db) -> list[Deleted]:
    # A deleted conversation cannot be locked, and its messages expire without a lock.
    await conversations.lock(db, conversation_id)
    due = await expiry.still_due(db, conversation_id, message_ids)
    gone = [await edits.expire(db, conversation_id, message_id) for message_id in due]
    return [one for one in gone if one is not None]
