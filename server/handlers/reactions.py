"""Reactions: add and remove."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EMOJI_PER_MESSAGE
from protocol.server import Changed, MessageChanged, MessageReacted, MessageUnreacted
from server.context import Context
from server.core.errors import NotFound
from server.db.database import Db
from server.domain.permissions import require_may_send
from server.queries import messages, reactions
from server.queries.messages import FoundMessage
from server.queries.reactions import ReactionChange


async def react(context: Context, frame: client.React) -> Changed:
    """Add an emoji to a message, and publish that. A repetition changes nothing."""
    async with context.transaction() as db:
        found = await _locked(db, context, frame)
        # A repeated reaction reaches nobody, so it needs no permission to send.
        if not (found.obstacle and await reactions.is_there(db, found.message, context.user_id, frame.emoji)):
            require_may_send(found)
        there = found.message.reactions
        if frame.emoji not in there and len(there) >= MAX_EMOJI_PER_MESSAGE:
            raise Refused(
                ErrorCode.CONFLICT,
                f"A message can have at most {MAX_EMOJI_PER_MESSAGE} different emoji. Use one of them.",
                path="emoji",
            )
        change = await reactions.react(db, found.message, context.user_id, frame.emoji)
    return _publish(context, found, change, MessageReacted)


async def unreact(context: Context, frame: client.Unreact) -> Changed:
    """Remove an emoji, and publish that. Without it, nothing changes. Removing needs no permission to send."""
    async with context.transaction() as db:
        found = await _locked(db, context, frame)
        emoji = await reactions.stored(db, found.message, context.user_id, frame.emoji)
        change = await reactions.unreact(db, found.message, context.user_id, emoji)
    return _publish(context, found, change, MessageUnreacted)


async def _locked(db: Db, context: Context, frame: client.React | client.Unreact) -> FoundMessage:
    found = await messages.lock(db, frame, context.user_id)
    if found is None or found.message.is_deleted:
        raise NotFound("message_id")
    return found


def _publish(
    context: Context, found: FoundMessage, change: ReactionChange, event: type[MessageReacted | MessageUnreacted]
) -> Changed:
    about, message_id = found.message.conversation_id, found.message.id
    if change.total is not None and found.is_from_before:
        context.events.publish(MessageChanged(conversation_id=about, version=change.version, message_id=message_id))
    elif change.total is not None:
        context.events.publish(
            event(
                conversation_id=about,
                version=change.version,
                message_id=message_id,
                user_id=context.user_id,
                emoji=change.emoji,
                count=change.total,
            )
        )
    return Changed(conversation_id=about, version=change.version)
