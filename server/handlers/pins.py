"""Pins, which all participants of a conversation see, and stars, which only their user sees."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_PINS
from protocol.roles import Act
from protocol.server import Changed, Done, MessageList
from server.context import Context
from server.core.errors import NotFound
from server.domain.permissions import require, require_may_send
from server.domain.publish import publish_changed
from server.queries import bounds, conversations, messages, pins
from server.queries.cursor import Cursor


async def pin(context: Context, frame: client.Pin) -> Changed:
    """Pin a message, and publish that. A pinned message does not change."""
    return await _set_pinned(context, frame, is_on=True)


async def unpin(context: Context, frame: client.Unpin) -> Changed:
    """Unpin a message, and publish that. Without a pin nothing changes."""
    return await _set_pinned(context, frame, is_on=False)


async def _set_pinned(context: Context, frame: client.Pin | client.Unpin, *, is_on: bool) -> Changed:
    async with context.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        if found is None or found.message.is_deleted:
            raise NotFound("message_id")
        if found.conversation.type != "direct":
            require(found.me, Act.PIN_MESSAGES)
        before = found.message
        if before.is_pinned == is_on:
            return Changed(conversation_id=before.conversation_id, version=before.version)
        require_may_send(found)
        if is_on and await pins.count(db, before.conversation_id) >= MAX_PINS:
            raise Refused(
                ErrorCode.CONFLICT,
                f"A conversation can have at most {MAX_PINS} pinned messages. Unpin one first.",
                path="conversation_id",
            )
        message = await pins.pin(db, before, context.user_id, is_on=is_on)
    return publish_changed(context.events, found, message)


async def list_pins(context: Context, frame: client.ListPins) -> MessageList:
    """Return a page of pinned messages."""
    async with context.database.connection() as db:
        found = await pins.page(db, frame.conversation_id, context.user_id, Cursor.read(frame.after))
    if found is None:
        raise NotFound("conversation_id")
    return await found.decoded()


async def star(context: Context, frame: client.Star) -> Done:
    """Star a message, on all of the caller's devices."""
    async with context.transaction() as db:
        if not await conversations.keep(db, frame.conversation_id, context.user_id):
            raise NotFound("message_id")
        starred = await pins.star(db, frame, context.user_id)
        if starred is None:
            raise NotFound("message_id")
        await bounds.require_stars(db, context.user_id)
    if starred.event is not None:
        context.events.tell_own(context.user_id, starred.event)
    return Done()


async def unstar(context: Context, frame: client.Unstar) -> Done:
    """Remove a star, even in a conversation that the caller can no longer read."""
    async with context.transaction() as db:
        starred = await pins.unstar(db, frame, context.user_id)
        await bounds.forget_stars(db, context.user_id)
    if starred.event is not None:
        context.events.tell_own(context.user_id, starred.event)
    return Done()


async def list_stars(context: Context, frame: client.ListStars) -> MessageList:
    """Return a page of the caller's starred messages."""
    async with context.database.connection() as db:
        found = await pins.stars(db, context.user_id, Cursor.read(frame.after), limit=frame.limit)
    return await found.decoded()
