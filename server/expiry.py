"""Messages that disappear: deleted for everyone when the time is over that the conversation's settings give them."""

from server.context import Events
from server.database import Database
from server.queries import conversations, edits, expiry
from server.telling import tell_deleted


async def expire_due(database: Database, events: Events) -> None:
    """Delete some of the messages whose time is over, and tell everyone. Any worker may; one of them does."""
    async with database.connection() as db:
        due = await expiry.due(db)
    for conversation_id, message_ids in due.items():
        async with database.transaction() as db:
            # Deleted as a whole, it is locked by nobody, and its messages go all the same.
            await conversations.lock(db, conversation_id)
            gone = [
                await edits.delete(db, message, None)
                for message in await expiry.still_due(db, conversation_id, message_ids)
            ]
        for message, root_reply_count in gone:
            tell_deleted(events, message, root_reply_count)
