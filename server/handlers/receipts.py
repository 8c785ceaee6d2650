"""Receipts: read, delivered, unread marks, and readers of a message."""

from protocol import client
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.server import Done, MessageDelivered, MessageRead, Readers, ReadUpTo, StateEvent
from server.context import Context
from server.core.errors import NotFound
from server.queries import participants, receipts, users


async def read(context: Context, frame: client.Read) -> ReadUpTo:
    """Move the caller's read position forward. Send that to all participants, or in a large conversation to the
    caller's devices only.
    """
    async with context.statement() as db:
        position = await receipts.read(db, frame, context.user_id)
    if position is not None and position.is_stale:
        async with context.transaction() as db:
            await users.lock(db, [context.user_id])
            await receipts.lock(db, frame.conversation_id, context.user_id)
            position = await receipts.read(db, frame, context.user_id)
    if position is None:
        raise NotFound("message_id")
    if position.preferences is not None:
        _tell_marked(context, frame, position.mark_version, position.preferences)
    if position.has_moved:
        event = MessageRead(
            conversation_id=position.conversation_id,
            user_id=context.user_id,
            message_id=position.message_id,
            revision=position.revision,
        )
        _tell(context, frame, event, position.participant_count)
    return ReadUpTo(
        conversation_id=position.conversation_id,
        message_id=position.message_id,
        unread_count=position.unread_count,
        version=position.version,
        revision=position.revision,
        mark_version=position.mark_version,
    )


async def delivered(context: Context, frame: client.Delivered) -> Done:
    """Store up to which message one of the caller's clients has received messages."""
    async with context.statement() as db:
        arrival = await receipts.delivered(db, frame, context.user_id, most=MAX_SHARED_PARTICIPANTS)
    if arrival is None:
        raise NotFound("message_id")
    if arrival.has_moved:
        event = MessageDelivered(
            conversation_id=frame.conversation_id,
            user_id=context.user_id,
            message_id=frame.message_id,
            revision=arrival.revision,
        )
        if arrival.told is None:
            _tell(context, frame, event, arrival.participant_count)
        for user_id in arrival.told or ():
            context.events.whisper(user_id, event)
    return Done()


async def mark_unread(context: Context, frame: client.MarkUnread) -> ReadUpTo:
    """Mark a conversation as unread from a message on."""
    async with context.statement() as db:
        mark = await receipts.mark_unread(db, frame, context.user_id)
    if mark is None:
        raise NotFound("message_id")
    _tell_marked(context, frame, mark.mark_version, mark.preferences)
    return ReadUpTo(
        conversation_id=frame.conversation_id,
        message_id=frame.message_id,
        unread_count=mark.unread_count,
        version=mark.version,
        mark_version=mark.mark_version,
    )


async def list_readers(context: Context, frame: client.ListReaders) -> Readers:
    """Return the users who have read a message."""
    async with context.database.connection() as db:
        found = await receipts.readers(db, frame, context.user_id, most=MAX_SHARED_PARTICIPANTS)
    if found is None:
        raise NotFound("message_id")
    return found


def _tell_marked(context: Context, frame: client.Read | client.MarkUnread, version: int, preferences: str) -> None:
    """Publish that a mark was set or removed."""
    event = participants.decoded_preferences(frame.conversation_id, version, preferences)
    context.events.tell_own(context.user_id, event)


def _tell(context: Context, frame: client.Read | client.Delivered, event: StateEvent, participant_count: int) -> None:
    if participant_count <= MAX_SHARED_PARTICIPANTS:
        context.events.relay(frame.conversation_id, event)
    else:
        context.events.whisper(context.user_id, event)
