"""Derived parts of a message: the HTML of its Markdown, its valid mentions and its hashtags."""

from protocol.client import Edit, Schedule, Send
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId, made_at
from protocol.limits import collapsed
from protocol.payloads import Code, Poll
from protocol.values import Message
from server.context import Context
from server.domain import markdown, mentions
from server.queries import mentions as meaning
from server.queries.sending import Derived, Outgoing, Source


def require_fair(frame: Send | Schedule) -> None:
    """Raise Refused if a message is a poll whose options look alike, or which closes before it is sent. The time in
    `message_id` counts as the time of sending. So a repetition after `closes_at` gets the first answer.
    """
    if not isinstance(frame.payload, Poll):
        return
    # The protocol's `Poll` does not check this, so that older polls in the database stay readable.
    if len({collapsed(option) for option in frame.payload.options}) != len(frame.payload.options):
        raise Refused(ErrorCode.INVALID, "`options` must differ by more than white space.", path="payload.options")
    if (closes_at := frame.payload.closes_at) is None:
        return
    if isinstance(frame, Schedule) and closes_at <= frame.send_at:
        raise Refused(ErrorCode.INVALID, "`closes_at` must be after `send_at`.", path="payload.closes_at")
    if closes_at.timestamp() * 1_000 <= made_at(frame.message_id):
        raise Refused(
            ErrorCode.INVALID, "`closes_at` must be after the time in `message_id`.", path="payload.closes_at"
        )


def is_closed(message: Message, poll: Poll) -> bool:
    """Whether a poll no longer accepts votes."""
    return message.poll_closed_at is not None or is_over(poll)


def is_over(poll: Poll) -> bool:
    """Whether a poll's `closes_at` has passed."""
    return poll.closes_at is not None and poll.closes_at <= now()


async def compose(context: Context, frame: Send | Edit, *, is_code: bool) -> Derived:
    """Return the derived parts of a message's content. Raises Refused if the HTML is too long."""
    formatted = await markdown.rendered(frame.content, context.user_id) if frame.is_markdown else None
    found = mentions.find(frame.content, is_code=is_code, is_markdown=frame.is_markdown)
    who: list[UserId] = []
    loud: list[str] = []
    if found.is_about_people:
        async with context.database.connection() as db:
            meant = await meaning.resolve(db, frame.conversation_id, context.user_id, found.ids, found.names)
        who, loud = meant.user_ids, found.loud if meant.may_be_loud else []
    return Derived(formatted, who, loud, found.hashtags)


async def outgoing(context: Context, frame: Send, source: Source | None = None) -> Outgoing:
    """Return a message as it will be stored. Raises Refused if its HTML is too long."""
    made = await compose(context, frame, is_code=isinstance(frame.payload, Code))
    return Outgoing(context.user_id, frame, made, source)
