"""Read positions."""

from protocol import client
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.server import MessageRead, ReadUpTo
from server.context import Context
from server.errors import NotFound
from server.queries import receipts


async def read(context: Context, frame: client.Read) -> ReadUpTo:
    """Move the caller's read position forward, and tell the others, or in a crowd only the caller's devices."""
    async with context.database.connection() as db:
        position = await receipts.read(db, frame, context.user_id)
    if position is None:
        raise NotFound("message_id")
    if position.has_moved:
        event = MessageRead(
            conversation_id=position.conversation_id, user_id=context.user_id, message_id=position.message_id
        )
        if position.participant_count <= MAX_SHARED_PARTICIPANTS:
            context.events.relay(position.conversation_id, event)
        else:
            context.events.whisper(context.user_id, event)
    return ReadUpTo(
        conversation_id=position.conversation_id,
        message_id=position.message_id,
        unread_count=position.unread_count,
    )
