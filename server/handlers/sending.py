"""Sending and forwarding messages."""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TypeAlias

from asyncpg import UniqueViolationError

from protocol import client
from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.limits import FURTHER_TOKENS, TOKEN_BYTES, part_of_mentions
from protocol.server import MessageSent, Sent
from protocol.values import Message
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.core.faults import is_lost
from server.db.database import Db
from server.domain.compose import outgoing, require_fair
from server.domain.permissions import OBSTACLES, slow_mode
from server.queries import messages, sending
from server.queries.sending import NotStored, Outgoing, Reason, Source, Stored

MAX_RACES = 5
"""Max attempts of a send whose access or id is changed by concurrent frames."""


class SourceChanged(Exception):  # noqa: N818 - the caller reads the message again
    """The message to forward was edited, deleted or hidden after it was read, or its reader lost access."""


def _forbidden(outcome: NotStored) -> Refused:
    return Refused(ErrorCode.FORBIDDEN, OBSTACLES[outcome.reason], path="conversation_id")  # type: ignore[index]


def _missing(outcome: NotStored) -> Refused:
    return NotFound(sending.MISSING[outcome.reason])


REFUSALS: dict[Reason, Callable[[NotStored], Exception]] = {
    "no_access": lambda _: NotFound("conversation_id"),
    "inactive": lambda _: NotActive(),
    "archived": _forbidden,
    "role": _forbidden,
    "unwanted": _forbidden,
    "missing_parent": _missing,
    "missing_quoted": _missing,
    "source_changed": lambda _: SourceChanged(),
    "slow": lambda outcome: slow_mode(outcome.wait_ms),
}
"""Errors for messages that no further attempt would store, by the reason."""

Note: TypeAlias = Callable[[Db], Awaitable[None]]
"""A write in the transaction of a message. If it raises, the message is not stored."""


async def send(context: Context, frame: client.Send) -> Sent:
    """Store a message once, and publish it."""
    require_fair(frame)
    return await _store(context, await outgoing(context, frame))


async def send_noted(context: Context, frame: client.Send, note: Note) -> Sent:
    """Do the same as `send`, and write `note` in the same transaction. If the message is stored already, the note is
    written, too.
    """
    return await _store(context, await outgoing(context, frame), note)


async def forward(context: Context, frame: client.Forward) -> Sent:
    """Send the content of a message to another conversation, with its original sender."""
    is_paid = False
    for _ in range(MAX_RACES):
        said = await _source(context, frame)
        if isinstance(said, Sent):
            return said
        again = _as_send(frame, said)
        further = len(encode(again)) // TOKEN_BYTES + int(FURTHER_TOKENS["forward"] * part_of_mentions(again.content))
        if further and not is_paid:
            context.services.writes.require(context.user_id, further, taken=1)
        is_paid = True
        with _renamed(), suppress(SourceChanged):
            out = await outgoing(context, again, _origin(said))
            # Only this part is retried, because a retry of the whole frame would take its tokens again.
            return await context.database.again("forward", partial(_store, context, out))
    raise _changing()


async def _source(context: Context, frame: client.Forward) -> Message | Sent:
    """Return the message to forward. If it can no longer be forwarded but was, return the first result."""
    async with context.database.connection() as db:
        found = await messages.get(db, frame, context.user_id)
    if found is None:
        raise NotFound("message_id")
    said = found.message
    if said.is_deleted or said.is_moderated:
        out = Outgoing(context.user_id, _as_send(frame, said), source=_origin(said))
        if reply := await _earlier_reply(context, out):
            return reply
        raise NotFound("message_id")
    if said.system_message_type is not None:
        raise Refused(
            ErrorCode.FORBIDDEN, "System messages cannot be forwarded. Name a message of a user.", path="message_id"
        )
    if said.is_unreadable:
        raise Refused(
            ErrorCode.FORBIDDEN,
            "A message with unreadable parts cannot be forwarded. Send a new one.",
            path="message_id",
        )
    return said


def _as_send(frame: client.Forward, said: Message) -> client.Send:
    """Return the `send` of a `forward`."""
    return client.Send(
        conversation_id=frame.to_conversation_id,
        message_id=frame.new_message_id,
        content=said.content or " ",
        payload=said.payload,
        metadata=said.metadata,
        is_markdown=said.formatted_content is not None,
    )


def _origin(said: Message) -> Source:
    return Source(said.conversation_id, said.id, said.forwarded_sender_id or said.sender_id, said.edited_at)


@contextmanager
def _renamed() -> Iterator[None]:
    """Rename the fields in refusals of a `send` to those of its `forward`."""
    try:
        yield
    except Refused as refused:
        refused.path = {"conversation_id": "to_conversation_id", "message_id": "new_message_id"}.get(
            refused.path or "", refused.path
        )
        raise


async def _store(context: Context, out: Outgoing, note: Note | None = None) -> Sent:
    for _ in range(MAX_RACES):
        outcome = await _outcome(context, out, note)
        if isinstance(outcome, Stored):
            return _published(context, out, outcome)
        if outcome.reason == "duplicate":
            return await _first_reply(context, out, note)
        if outcome.reason == "loud":
            out = await outgoing(context, out.frame, out.source)
        elif outcome.reason != "changed":
            raise REFUSALS[outcome.reason](outcome)
    raise _changing()


async def _outcome(context: Context, out: Outgoing, note: Note | None) -> Stored | NotStored:
    """Store a message in the next batch, or with a note in a transaction of its own. If the outcome is unknown, add the
    message to `unconfirmed`.
    """
    tried_at = datetime.now(UTC)
    try:
        if note is None:
            return await context.services.sends.submit(out)
        async with context.transaction() as db:
            outcome = await sending.send_alone(db, out)
            if isinstance(outcome, Stored):
                await note(db)
    except UniqueViolationError:
        return NotStored("changed")
    except BaseException as error:
        if is_lost(error) or isinstance(error, CancelledError):
            context.services.unconfirmed.add(out.frame.message_id, tried_at)
            context.events.recheck(out.sender_id, out.frame.conversation_id)
        raise
    return outcome


def _published(context: Context, out: Outgoing, stored: Stored) -> Sent:
    """Publish a message that was just stored, and return the reply."""
    frame = out.frame
    # An earlier attempt with an unknown outcome did not store the message.
    context.services.unconfirmed.settle(frame.message_id, stored.created_at)
    message = _message(out, stored)
    context.events.publish(
        MessageSent(
            conversation_id=frame.conversation_id,
            version=stored.version,
            message=message,
            root_reply_count=stored.root_reply_count,
        )
    )
    _enqueue(context, message)
    return _sent(out, stored.version, stored.created_at)


def _enqueue(context: Context, message: Message) -> None:
    """Enqueue the work that follows a send."""
    for work in (context.services.web_push, context.services.previews, context.services.search_indexer):
        work.enqueue(message)


async def _first_reply(context: Context, out: Outgoing, note: Note | None) -> Sent:
    """Return the reply to the first attempt of a message, and write the note. Raises Refused if another message has the
    id.
    """
    reply = await _earlier_reply(context, out)
    if reply is None:
        raise Refused(ErrorCode.CONFLICT, "Another message has this id. Make a new id.", path="message_id")
    if note is not None:
        async with context.transaction() as db:
            await note(db)
    return reply


async def _earlier_reply(context: Context, out: Outgoing) -> Sent | None:
    """Return the reply to the first attempt of a message, or None if the message is not stored."""
    async with context.database.connection() as db:
        earlier = await sending.earlier(db, out)
    if earlier is None or not earlier.is_same:
        return None
    if context.services.unconfirmed.settle(out.frame.message_id, earlier.created_at):
        # The comparison of positions delivers the event, but nothing else enqueues these.
        _enqueue(context, _message(out, Stored(earlier.version, earlier.created_at, None, None, None, 0)))
    return _sent(out, earlier.version, earlier.created_at)


def _sent(out: Outgoing, version: int, created_at: datetime) -> Sent:
    frame = out.frame
    return Sent(
        conversation_id=frame.conversation_id, message_id=frame.message_id, version=version, created_at=created_at
    )


def _changing() -> Refused:
    return Refused(
        ErrorCode.UNAVAILABLE,
        "The conversation is changing. Retry the same frame after `retry_after_ms`.",
        retry_after_ms=100,
    )


def _message(out: Outgoing, stored: Stored) -> Message:
    frame = out.frame
    return Message(
        id=frame.message_id,
        conversation_id=frame.conversation_id,
        sender_id=out.sender_id,
        content=frame.content,
        content_type=out.content_type,
        payload=frame.payload,
        formatted_content=out.derived.formatted_content,
        mentions=list(out.derived.mentions),
        loud_mentions=list(out.derived.loud_mentions),
        hashtags=list(out.derived.hashtags),
        metadata=frame.metadata,
        parent_message_id=frame.parent_message_id,
        thread_root_id=stored.root_id,
        thread_order=stored.thread_order,
        also_in_conversation=frame.also_in_conversation,
        quoted_message_id=frame.quoted_message_id,
        forwarded_from_id=out.source and out.source.message_id,
        forwarded_sender_id=out.source and out.source.sender_id,
        poll_counts=out.poll_counts,
        expires_at=stored.expires_at,
        sent_version=stored.version,
        version=stored.version,
        created_at=stored.created_at,
    )
