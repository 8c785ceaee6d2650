"""Search for messages, and the delivery report of one message."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.roles import Act, may
from protocol.server import DeliveryReport, SearchPage
from server.context import Context
from server.core.errors import NotFound
from server.domain import search_text
from server.queries import delivery_report, messages
from server.queries.search import find


async def search(context: Context, frame: client.Search) -> SearchPage:
    """Return a page of messages that match."""
    if frame.text is None and frame.hashtag is None and frame.conversation_id is None and not frame.mentions_me:
        raise Refused(ErrorCode.INVALID, "Give at least one of `text`, `hashtag`, `mentions_me` and `conversation_id`.",
                      path="text")  # fmt: skip
    words = None if frame.text is None else search_text.query(frame.text, prefix=search_text.PREFIX_OF_WORDS)
    async with context.database.searching() as db:
        found = await find(db, context.user_id, frame, words, limit=frame.limit)
    return await found.decoded()


async def why(context: Context, frame: client.Why) -> DeliveryReport:
    """Return to whom a message was delivered, and why it did not reach others."""
    async with context.database.connection() as db:
        told = await delivery_report.of(db, frame.message_id, frame.conversation_id, viewer=context.user_id)
        # Checked last, so that a caller who may read now may read all of the result.
        found = await messages.find(db, frame, context.user_id)
        if found is None or told is None:
            raise NotFound("message_id")
        if found.message.sender_id != context.user_id and not may(found.me, Act.MODERATE):
            raise Refused(
                ErrorCode.FORBIDDEN,
                "Only the sender and moderators may trace a message. Ask one of them.",
                path="message_id",
            )
    return delivery_report.answer(told, context.events.published_at(found.message.conversation_id, told.version))
