"""Messages that disappear: deleted for everyone when the time is over that the conversation's settings give them."""

import logging
from functools import partial

from asyncpg import LockNotAvailableError

from protocol.ids import ConversationId, MessageId, UserId
from server.context import Events
from server.core.errors import is_lost, log_failure
from server.db.database import Database, Db
from server.domain.publish import publish_deleted
from server.queries import conversations, edits, expiry
from server.queries.edits import Deleted

log = logging.getLogger(__name__)


async def expire_due(database: Database, events: Events) -> None:
    """Delete the messages whose time is over, and tell everyone. Any worker may; one of them does. Senders take turns,
    so nobody's messages wait for all those of another sender. A conversation that is held for long, or that failed, has
    its turn in a later run. Raises what asking for the next ones raises: without a database the run ends.
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
            except Exception as error:  # noqa: BLE001 - the others are due, too
                log_failure(log, f"expiry in {conversation_id}", error)
                failed.add(conversation_id)
                if is_lost(error):
                    break  # a statement may have been too slow for the client: ask whether the database is there


async def _expire(
    database: Database, events: Events, conversation_id: ConversationId, message_ids: list[MessageId]
) -> None:
    """Delete messages in portions: whoever sends to the conversation has their turn between two of them."""
    for start in range(0, len(message_ids), expiry.PORTION):
        portion = message_ids[start : start + expiry.PORTION]
        async with database.connection() as db:
            while await expiry.forget_edits(db, conversation_id, portion):
                pass
        for deleted in await database.atomically("expiry", partial(_expire_portion, conversation_id, portion)):
            publish_deleted(events, deleted)


async def _expire_portion(conversation_id: ConversationId, message_ids: list[MessageId], db: Db) -> list[Deleted]:
    # Deleted as a whole, it is locked by nobody, and its messages go all the same.
    await conversations.lock(db, conversation_id)
    due = await expiry.still_due(db, conversation_id, message_ids)
    gone = [await edits.expire(db, conversation_id, message_id) for message_id in due]
    return [one for one in gone if one is not None]
