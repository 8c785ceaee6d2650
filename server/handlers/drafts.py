"""Drafts and scheduled messages."""

from datetime import timedelta

from msgspec import convert

from protocol import client, json_object
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_SCHEDULED
from protocol.server import Done, DraftList, OneScheduled, ScheduledList
from protocol.values import Scheduled, Words
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain.compose import outgoing, require_fair
from server.domain.permissions import require_may_send
from server.queries import conversations, drafts, scheduled, sending, users
from server.queries.cursor import Cursor
from server.queries.sending import Outgoing

LATEST = timedelta(days=366)
"""Max time from now to `send_at`."""
OLDEST = timedelta(days=30)
"""Max age of `send_at` of a new message. queries/scheduled.py relies on it."""


async def set_draft(context: Context, frame: client.SetDraft) -> Done:
    """Store the caller's draft for a conversation."""
    async with context.transaction() as db:
        if not await conversations.keep(db, frame.conversation_id, context.user_id):
            raise NotFound("conversation_id")
        await users.lock(db, [context.user_id])
        event = await drafts.put(db, frame, context.user_id)
        if event is None:
            raise NotFound("conversation_id")
    context.events.tell_own(context.user_id, event)
    return Done()


async def list_drafts(context: Context, frame: client.ListDrafts) -> DraftList:
    """Return a page of the caller's drafts."""
    async with context.database.connection() as db:
        found = await drafts.page(db, context.user_id, Cursor.read(frame.after))
    page = await found.decoded()
    return DraftList(drafts=page.rows, after=page.after)


async def schedule(context: Context, frame: client.Schedule) -> OneScheduled:
    """Schedule a message, or change a scheduled one."""
    if frame.send_at > now() + LATEST:
        raise Refused(ErrorCode.INVALID, "`send_at` must be at most 366 days ahead.", path="send_at")
    require_fair(frame)
    # A message that is too large is refused now. When it is due, its sender may be offline.
    out = await outgoing(context, _as_send(frame))
    async with context.transaction() as db:
        # Access is read under the conversation's lock, as for all frames that send something.
        if await conversations.lock_as(db, frame.conversation_id, context.user_id) is None:
            raise NotFound("conversation_id")
        access = await conversations.send_access(db, frame.conversation_id, context.user_id)
        if access is None:
            raise NotFound("conversation_id")
        if not await users.lock(db, [context.user_id]):
            raise NotActive
        there = await scheduled.get(db, frame.message_id, context.user_id, frame.conversation_id)
        if (sent := await _sent_before(db, frame, out, there)) is not None:
            return OneScheduled(scheduled=sent)
        if there is None:
            # Slow mode applies when the message is due. All other checks are repeated then.
            require_may_send(access._replace(wait_ms=0))
            if await scheduled.count(db, context.user_id) >= MAX_SCHEDULED:
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"You can have at most {MAX_SCHEDULED} scheduled messages. Cancel one first.",
                )
        made = await scheduled.put(db, frame, context.user_id)
        if made is None:
            if there is not None and await scheduled.is_repeated(db, frame, context.user_id):
                return OneScheduled(scheduled=there)
            raise _too_late(there)
    context.events.tell_own(context.user_id, made)
    return OneScheduled(scheduled=made.scheduled)


async def cancel(context: Context, frame: client.CancelScheduled) -> OneScheduled:
    """Cancel a scheduled message."""
    async with context.transaction() as db:
        await users.lock(db, [context.user_id])
        there = await scheduled.get(db, frame.message_id, context.user_id, frame.conversation_id)
        if there is None:
            raise NotFound("message_id")
        made = await scheduled.cancel(db, frame.message_id, context.user_id, frame.conversation_id)
        if made is None:
            if there.status == "cancelled":
                return OneScheduled(scheduled=there)
            raise _too_late(there)
    context.events.tell_own(context.user_id, made)
    return OneScheduled(scheduled=made.scheduled)


async def list_scheduled(context: Context, frame: client.ListScheduled) -> ScheduledList:
    """Return a page of messages that are scheduled or could not be sent."""
    async with context.database.connection() as db:
        found = await scheduled.page(db, context.user_id, Cursor.read(frame.after))
    page = await found.decoded()
    return ScheduledList(scheduled=page.rows, after=page.after)


def _too_late(there: Scheduled | None) -> Refused:
    """Return why a scheduled message cannot change. One that is being sent may be deferred, and can change
    after that.
    """
    retry_after_ms = None
    if there is None:
        sentence = "Another message has this id. Make a new id."
    elif there.status == "waiting":
        sentence = "The message is being sent. Edit or delete it when it is sent, or retry after `retry_after_ms`."
        retry_after_ms = int(scheduled.CLAIMED.total_seconds() * 1_000)
    elif there.status == "sent":
        sentence = "The message was sent. Edit or delete it instead."
    elif there.status == "failed":
        sentence = "The message could not be sent. Schedule a new one."
    else:
        sentence = "The message was cancelled. Schedule a new one."
    return Refused(ErrorCode.CONFLICT, sentence, path="message_id", retry_after_ms=retry_after_ms)


async def _sent_before(db: Db, frame: client.Schedule, out: Outgoing, there: Scheduled | None) -> Scheduled | None:
    """Return a scheduled message whose row is deleted because it was sent long ago. Return None if there is a row, or
    if nothing has the id. Raises Refused if another message has the id. Also raises Refused if a new `send_at` is so
    old that the row of a cancelled message may be deleted.
    """
    if there is None:
        earlier = await sending.earlier(db, out)
        if earlier is not None and earlier.is_same:
            return Scheduled(
                message_id=frame.message_id,
                conversation_id=frame.conversation_id,
                words=convert(frame, Words, from_attributes=True, dec_hook=json_object.accept),
                send_at=frame.send_at,
                status="sent",
                created_at=earlier.created_at,
            )
        if earlier is not None:
            raise _too_late(None)
    is_new = there is None or (there.status == "waiting" and there.send_at != frame.send_at)
    if is_new and frame.send_at < now() - OLDEST:
        sentence = f"`send_at` must be at most {OLDEST.days} days ago. Send the message now, with `send`."
        raise Refused(ErrorCode.INVALID, sentence, path="send_at")
    return None


def _as_send(frame: client.Schedule) -> client.Send:
    """Return the `send` of a scheduled message."""
    return client.Send(**{name: getattr(frame, name) for name in client.Send.__struct_fields__ if name != "id"})
