"""Sending and forwarding messages."""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Literal, TypeAlias

from asyncpg import UniqueViolationError

from protocol import client
from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.limits import FURTHER_TOKENS, TOKEN_BYTES, part_of_mentions
from protocol.server import MessageSent, Sent
from protocol.values import Message
from server.context import Context
from server.core.errors import NotActive, NotFound, is_lost
from server.db.database import Db
from server.domain.compose import outgoing, require_fair
from server.domain.permissions import OBSTACLES, slow_mode
from server.queries import messages, sending
from server.queries.sending import Outgoing, Source, Stored

MAX_RACES = 5
"""Max attempts of a send whose access or id is changed by concurrent frames."""


class SourceChanged(Exception):  # noqa: N818 - the caller reads the message again
    """The message to forward was edited, deleted or hidden after it was read, or its reader lost access."""


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
        with _renamed(), suppress(SourceChanged):
            answer = await _why_not(context, Outgoing(context.user_id, _as_send(frame, said), source=_origin(said)))
            if isinstance(answer, Sent):
                return answer
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
    frame = out.frame
    is_slow = False
    for _ in range(MAX_RACES):
        tried_at = datetime.now(UTC)
        try:
            if is_slow or note is not None:
                stored = await _send_alone(context, out, note, is_slow=is_slow)
            else:
                stored = await context.services.sends.submit(out)
        except UniqueViolationError:
            stored = None
        except BaseException as error:
            if is_lost(error) or isinstance(error, CancelledError):
                context.services.unconfirmed.add(frame.message_id, tried_at)
            raise
        if stored is not None:
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
            context.services.web_push.enqueue(message)
            context.services.previews.enqueue(message)
            return Sent(
                conversation_id=frame.conversation_id,
                message_id=frame.message_id,
                version=stored.version,
                created_at=stored.created_at,
            )
        answer = await _why_not(context, out)
        if isinstance(answer, Sent):
            if note is not None:
                async with context.transaction() as db:
                    await note(db)
            return answer
        is_slow = answer == "slow"
        if out.made.loud_mentions:
            # The sender may have lost the role that these mentions require.
            out = await outgoing(context, frame, out.source)
    raise _changing()


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
        formatted_content=out.made.formatted_content,
        mentions=list(out.made.mentions),
        loud_mentions=list(out.made.loud_mentions),
        hashtags=list(out.made.hashtags),
        metadata=frame.metadata,
        parent_message_id=frame.parent_message_id,
        thread_root_id=stored.root_id,
        thread_order=stored.thread_order,
        also_in_conversation=frame.also_in_conversation,
        quoted_message_id=frame.quoted_message_id,
        forwarded_from_id=out.source and out.source.message_id,
        forwarded_sender_id=out.source and out.source.sender_id,
        poll_counts=None if out.options is None else [0] * out.options,
        expires_at=stored.expires_at,
        sent_version=stored.version,
        version=stored.version,
        created_at=stored.created_at,
    )


async def _send_alone(context: Context, out: Outgoing, note: Note | None, *, is_slow: bool) -> Stored | None:
    """Store a message in a transaction of its own, in slow mode or with a note."""
    stored: Stored | int | None
    async with context.transaction() as db:
        if is_slow:
            stored = await sending.send_slowly(db, out)
        else:
            (stored,) = await sending.send(db, [out])
        if isinstance(stored, Stored) and note is not None:
            await note(db)
    if isinstance(stored, int):
        raise slow_mode(stored)
    return stored


async def _why_not(context: Context, out: Outgoing) -> Sent | Literal["slow"] | None:
    """Return the first result if the message was stored before, "slow" if slow mode may apply, and None to retry.
    Raises Refused if the sender may not send, or SourceChanged.
    """
    frame = out.frame
    async with context.database.connection() as db:
        there = await sending.existing(db, out)
    if there.is_same and there.version is not None and there.created_at is not None:
        if context.services.unconfirmed.settle(frame.message_id, there.created_at):
            # The comparison of positions delivers the event, but nothing else enqueues these.
            message = _message(out, Stored(there.version, there.created_at, None, None, None, 0))
            context.services.web_push.enqueue(message)
            context.services.previews.enqueue(message)
        return Sent(
            conversation_id=frame.conversation_id,
            message_id=frame.message_id,
            version=there.version,
            created_at=there.created_at,
        )
    if there.obstacle == "access":
        raise NotFound("conversation_id")
    if there.obstacle == "inactive":
        raise NotActive
    if there.obstacle in OBSTACLES:
        raise Refused(ErrorCode.FORBIDDEN, OBSTACLES[there.obstacle], path="conversation_id")
    if there.version is not None:
        raise Refused(ErrorCode.CONFLICT, "Another message has this id. Make a new id.", path="message_id")
    if there.missing is not None:
        raise NotFound(there.missing)
    if there.is_source_changed:
        raise SourceChanged
    return "slow" if there.obstacle == "slow" else None
