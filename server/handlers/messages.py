"""Messages: send, edit, delete, history."""

from typing import Literal

from asyncpg import UniqueViolationError

from protocol import client
from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.ids import EditId, uuid7
from protocol.limits import MAX_METADATA_BYTES, MAX_PAGE
from protocol.roles import Act
from protocol.server import (
    Changed,
    EditPage,
    MessageDeleted,
    MessagePage,
    MessageSent,
    OneMessage,
    Sent,
)
from protocol.values import Message
from server.context import Context
from server.errors import NotFound
from server.permissions import require
from server.queries import audit, messages
from server.queries.audit import Deed
from server.queries.messages import Outgoing, Span, Stored
from server.telling import tell_changed

MAX_RACES = 5
"""How often a send is tried again when the sender's access, or the message's id, changed under it."""


OBSTACLES = {
    "archived": "The conversation is archived: nobody can send in it.",
    "role": "Your role cannot send in this conversation.",
    "unwanted": "This user cannot be written to.",
}


async def send(context: Context, frame: client.Send) -> Sent:
    """Store a message, once, and tell everyone."""
    if frame.metadata is not None and len(encode(frame.metadata)) > MAX_METADATA_BYTES:
        raise Refused(ErrorCode.INVALID, f"Metadata takes at most {MAX_METADATA_BYTES} bytes.", path="metadata")
    outgoing = Outgoing(context.user_id, frame)
    is_slow = False
    for _ in range(MAX_RACES):
        try:
            stored = await (_send_slowly(context, outgoing) if is_slow else context.services.sends.submit(outgoing))
        except UniqueViolationError:
            stored = None
        if stored is not None:
            context.events.publish(_sent_event(context, frame, stored))
            return Sent(
                conversation_id=frame.conversation_id,
                message_id=frame.message_id,
                version=stored.version,
                created_at=stored.created_at,
            )
        answer = await _why_not(context, outgoing)
        if isinstance(answer, Sent):
            return answer
        is_slow = answer == "slow"
    raise Refused(ErrorCode.UNAVAILABLE, "The conversation is changing; send this again.", retry_after_ms=100)


def _sent_event(context: Context, frame: client.Send, stored: Stored) -> MessageSent:
    message = Message(
        id=frame.message_id,
        conversation_id=frame.conversation_id,
        sender_id=context.user_id,
        content=frame.content,
        content_type=frame.content_type,
        formatted_content=frame.formatted_content,
        mentions=frame.mentions,
        metadata=frame.metadata,
        parent_message_id=frame.parent_message_id,
        thread_root_id=stored.root_id,
        sent_version=stored.version,
        version=stored.version,
        created_at=stored.created_at,
    )
    return MessageSent(
        conversation_id=frame.conversation_id,
        version=stored.version,
        message=message,
        root_reply_count=stored.root_reply_count,
    )


async def _send_slowly(context: Context, outgoing: Outgoing) -> Stored | None:
    async with context.database.transaction() as db:
        stored = await messages.send_slowly(db, outgoing)
    if isinstance(stored, int):
        raise Refused(ErrorCode.RATE_LIMITED, "This conversation is in slow mode.", retry_after_ms=stored)
    return stored


async def _why_not(context: Context, outgoing: Outgoing) -> Sent | Literal["slow"] | None:
    """Return the first answer if the message was stored before, "slow" if the sender may have to wait, None to try
    again; raises Refused otherwise.
    """
    frame = outgoing.frame
    async with context.database.connection() as db:
        there = await messages.existing(db, outgoing)
    if there.is_same and there.version is not None and there.created_at is not None:
        return Sent(
            conversation_id=frame.conversation_id,
            message_id=frame.message_id,
            version=there.version,
            created_at=there.created_at,
        )
    if there.obstacle == "access":
        raise NotFound("conversation_id")
    if there.obstacle in OBSTACLES:
        raise Refused(ErrorCode.FORBIDDEN, OBSTACLES[there.obstacle])
    if there.version is not None:
        raise Refused(ErrorCode.CONFLICT, "This id is taken by another message.", path="message_id")
    if not there.has_parent:
        raise NotFound("parent_message_id")
    return "slow" if there.obstacle == "slow" else None


async def edit(context: Context, frame: client.Edit) -> Changed:
    """Change what the caller's own message says, keep what it said, and tell everyone."""
    async with context.database.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        if found is None:
            raise NotFound("message_id")
        before = found.message
        if frame.edit_id is not None and (earlier := await messages.edited(db, frame, context.user_id)) is not None:
            version, is_same = earlier
            if not is_same:
                raise Refused(ErrorCode.CONFLICT, "This id is taken by another edit.", path="edit_id")
            return Changed(conversation_id=before.conversation_id, version=version)
        if before.is_deleted:
            raise NotFound("message_id")
        if before.sender_id != context.user_id or before.system_message_type is not None:
            raise Refused(ErrorCode.FORBIDDEN, "Only its sender can edit a message.", path="message_id")
        if before.is_moderated:
            raise Refused(ErrorCode.FORBIDDEN, "A moderator has hidden this message.", path="message_id")
        if (before.content, before.formatted_content) == (frame.content, frame.formatted_content):
            return Changed(conversation_id=before.conversation_id, version=before.version)
        edit_id = frame.edit_id or EditId(uuid7())
        message = await messages.edit(db, before, context.user_id, frame, edit_id)
    return tell_changed(context, found, message)


async def delete(context: Context, frame: client.Delete) -> Changed:
    """Take a message's words away and tell everyone."""
    async with context.database.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        if found is None:
            raise NotFound("message_id")
        before = found.message
        is_own = before.sender_id == context.user_id and before.system_message_type is None
        if not is_own:
            require(found.me, Act.DELETE_MESSAGES)
        if before.is_deleted:
            return Changed(conversation_id=before.conversation_id, version=before.version)
        if not is_own:
            deed = Deed(context.user_id, "delete_message", before.sender_id, before.id)
            await audit.record(db, before.conversation_id, deed)
        message, root_reply_count = await messages.delete(db, before, context.user_id)
    context.events.publish(
        MessageDeleted(
            conversation_id=message.conversation_id,
            version=message.version,
            message=message,
            root_reply_count=root_reply_count,
        )
    )
    return Changed(conversation_id=message.conversation_id, version=message.version)


async def history(context: Context, frame: client.History) -> MessagePage:
    """Return a page of messages."""
    if frame.before is not None:
        span = Span(frame.before, frame.limit, 0)
    elif frame.after is not None:
        span = Span(frame.after, 0, frame.limit, is_after=True)
    elif frame.around is not None:
        span = Span(frame.around, frame.limit // 2, frame.limit - frame.limit // 2)
    else:
        span = Span(None, frame.limit, 0)
    async with context.database.connection() as db:
        try:
            page = await messages.page(db, frame.conversation_id, context.user_id, span)
        except LookupError:
            side = next(name for name in ("before", "after", "around") if getattr(frame, name) is not None)
            raise NotFound(side) from None
    if page is None:
        raise NotFound("conversation_id")
    return page


async def get(context: Context, frame: client.GetMessage) -> OneMessage:
    """Return one message."""
    async with context.database.connection() as db:
        found = await messages.get(db, frame, context.user_id)
    if found is None:
        raise NotFound("message_id")
    return found


async def list_edits(context: Context, frame: client.ListEdits) -> EditPage:
    """Return what a message said before."""
    async with context.database.connection() as db:
        edits = await messages.edits(db, frame, context.user_id, limit=MAX_PAGE)
    if edits is None:
        raise NotFound("message_id")
    return EditPage(edits=edits)
