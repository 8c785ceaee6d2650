"""Messages that disappear: deleted for everyone when the time is over that the conversation's settings give them."""

from functools import partial

from protocol.ids import ConversationId, MessageId
from protocol.values import Message
from server.context import Events
from server.database import Database, Db
from server.queries import conversations, edits, expiry
from server.telling import tell_deleted


async def expire_due(database: Database, events: Events) -> None:
    """Delete some of the messages whose time is over, and tell everyone. Any worker may; one of them does."""
    async with database.connection() as db:
        due = await expiry.due(db)
    for conversation_id, message_ids in due.items():
        gone = await database.atomically("expiry", partial(_expire, conversation_id, message_ids))
        for message, root_reply_count in gone:
            tell_deleted(events, message, root_reply_count)


async def _expire(
    conversation_id: ConversationId, message_ids: list[MessageId], db: Db
) -> list[tuple[Message, int | None]]:
    # Deleted as a whole, it is locked by nobody, and its messages go all the same.
    await conversations.lock(db, conversation_id)
    return [
        await edits.delete(db, message, None) for message in await expiry.still_due(db, conversation_id, message_ids)
    ]
