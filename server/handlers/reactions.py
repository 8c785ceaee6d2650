"""Reactions: put on, taken back."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EMOJI_PER_MESSAGE
from protocol.server import Changed, MessageChanged, MessageReacted, MessageUnreacted
from server.context import Context
from server.core.errors import NotFound
from server.domain.permissions import require_may_send
from server.queries import messages, reactions


async def react(context: Context, frame: client.React | client.Unreact) -> Changed:
    """Put an emoji on a message, or take it back, and tell everyone; nothing happens if it is so already."""
    async with context.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        if found is None or found.message.is_deleted:
            raise NotFound("message_id")
        # Taking a reaction back says nothing; neither does one that is there already.
        if isinstance(frame, client.React) and not (
            found.obstacle and await reactions.is_there(db, found.message, context.user_id, frame)
        ):
            require_may_send(found)
        if isinstance(frame, client.Unreact):
            frame = await reactions.stored(db, found.message, context.user_id, frame)
        there = found.message.reactions
        if isinstance(frame, client.React) and frame.emoji not in there and len(there) >= MAX_EMOJI_PER_MESSAGE:
            raise Refused(
                ErrorCode.CONFLICT,
                f"A message can have at most {MAX_EMOJI_PER_MESSAGE} different emoji. Use one of them.",
                path="emoji",
            )
        version, count = await reactions.react(db, found.message, context.user_id, frame)
    if count is not None and found.is_from_before:
        about = found.message.conversation_id
        context.events.publish(MessageChanged(conversation_id=about, version=version, message_id=frame.message_id))
    elif count is not None:
        event = MessageReacted if isinstance(frame, client.React) else MessageUnreacted
        context.events.publish(
            event(
                conversation_id=found.message.conversation_id,
                version=version,
                message_id=frame.message_id,
                user_id=context.user_id,
                emoji=frame.emoji,
                count=count,
            )
        )
    return Changed(conversation_id=found.message.conversation_id, version=version)
