"""Reactions: add and remove."""

from collections.abc import Callable

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EMOJI_OF_USER, MAX_EMOJI_PER_MESSAGE
from protocol.reaction import normalized
from protocol.server import Changed, MessageChanged, MessageReacted, MessageUnreacted
from server.context import Context
from server.domain import batched_changes
from server.queries.batched_changes import NotChanged
from server.queries.reactions import ReactionChange, ReactionRequest


def _too_many(message: str) -> Callable[[NotChanged], Refused]:
    return lambda _: Refused(ErrorCode.CONFLICT, message, path="emoji")


REFUSALS: batched_changes.Refusals = {
    **batched_changes.REFUSALS,
    "too_many_of_message": _too_many(
        f"A message can have at most {MAX_EMOJI_PER_MESSAGE} different emoji. Use one of them."
    ),
    "too_many_of_user": _too_many(
        f"You can use at most {MAX_EMOJI_OF_USER} different emoji per message, removed ones included. Reuse one."
    ),
}


async def react(context: Context, frame: client.React) -> Changed:
    """Add an emoji to a message, and publish that. A repetition changes nothing."""
    change = await _change(context, frame, frame.emoji)
    return _publish(context, frame, change, MessageReacted)


async def unreact(context: Context, frame: client.Unreact) -> Changed:
    """Remove an emoji, and publish that. Without it, nothing changes. Removing needs no permission to send."""
    invalid = None
    try:
        emoji = normalized(frame.emoji)
    except ValueError as error:
        emoji, invalid = frame.emoji, str(error)
    change = await _change(context, frame, emoji)
    if change.total is None and invalid is not None:
        raise Refused(ErrorCode.INVALID, invalid, path="emoji")
    return _publish(context, frame, change, MessageUnreacted)


async def _change(context: Context, frame: client.React | client.Unreact, emoji: str) -> ReactionChange:
    """Add or remove a reaction in the next batch."""
    reaction = ReactionRequest(
        frame.conversation_id,
        frame.message_id,
        context.user_id,
        normal=emoji,
        typed=frame.emoji,
        is_added=isinstance(frame, client.React),
    )
    return await batched_changes.change(context.services.reactions, reaction, REFUSALS)


def _publish(
    context: Context,
    frame: client.React | client.Unreact,
    change: ReactionChange,
    event: type[MessageReacted | MessageUnreacted],
) -> Changed:
    about, message_id = frame.conversation_id, frame.message_id
    if change.total is not None and change.is_from_before:
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
