"""Messages: edit, delete, get, and history. sending.py sends them."""

from datetime import timedelta

from protocol import client
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EDITS, MAX_PAGE
from protocol.payloads import Poll
from protocol.roles import Act, may
from protocol.server import Changed, EditPage, MessagePage, OneMessage
from protocol.values import Message
from server.context import Context
from server.core.errors import NotFound
from server.domain.compose import compose, is_closed
from server.domain.permissions import require, require_may_send, require_sender_not_above
from server.domain.publish import publish_changed, publish_deleted
from server.queries import audit, edits, messages, sending
from server.queries.audit import Deed
from server.queries.messages import FoundMessage, Span
from server.queries.sending import Derived


async def edit(context: Context, frame: client.Edit) -> Changed:
    """Change the content of the caller's own message, keep the old one as an edit, and publish the change."""
    async with context.database.connection() as db:
        there = await messages.find(db, frame, context.user_id)
    made = await _made_anew(context, frame, None if there is None else there.message)
    async with context.transaction() as db:
        found_before = there and await edits.words(db, frame, frame.content, made)
        found = await messages.lock(db, frame, context.user_id)
        if found is None:
            raise NotFound("message_id")
        before = found.message
        if frame.edit_id is not None and (earlier := await edits.edited(db, frame, context.user_id)) is not None:
            version, is_repeated = earlier
            if not is_repeated:
                raise Refused(ErrorCode.CONFLICT, "Another edit has this id. Make a new id.", path="edit_id")
            return Changed(conversation_id=before.conversation_id, version=version)
        _require_editable(context, found)
        # An edit with an id is stored even if it changes nothing. Otherwise its repetition after a later edit would
        # undo that one.
        is_same = (before.content, before.formatted_content) == (frame.content, made.formatted_content)
        if is_same and frame.edit_id is None:
            return Changed(conversation_id=before.conversation_id, version=before.version)
        _require_nobody_voted(before)
        require_may_send(found)
        words = found_before and found_before.words
        if made.loud_mentions and not may(found.me, Act.BE_LOUD):
            # The content was composed before the lock, and the sender may have lost the role since.
            made, words = made._replace(loud_mentions=[]), None
        # Further edits are refused. Deleting old ones would lose the content by which an edit is recognized
        # (`edits.EDITED`).
        if await edits.count(db, before) >= MAX_EDITS:
            sentence = f"A message can be edited at most {MAX_EDITS} times. Send a new one."
            raise Refused(ErrorCode.CONFLICT, sentence, path="message_id")
        message = await edits.edit(db, before, context.user_id, frame, made, words=words)
        if found.conversation.settings.slow_mode_seconds:
            await sending.begin_wait(db, before.conversation_id, context.user_id, now())
    context.services.previews.enqueue(message)
    return publish_changed(context.events, found, message)


async def _made_anew(context: Context, frame: client.Edit, there: Message | None) -> Derived:
    """Return the derived parts of an edit's content. An unchanged message has them already."""
    if there is not None and (there.content, there.formatted_content is not None) == (frame.content, frame.is_markdown):
        return Derived(there.formatted_content, there.mentions, there.loud_mentions, there.hashtags)
    return await compose(context, frame, is_code=there is not None and there.content_type == "code")


def _require_editable(context: Context, found: FoundMessage) -> None:
    message = found.message
    if message.is_deleted:
        raise NotFound("message_id")
    if message.sender_id != context.user_id or message.system_message_type is not None:
        raise Refused(ErrorCode.FORBIDDEN, "Only the sender can edit a message. Send a new one.", path="message_id")
    if message.is_moderated:
        raise Refused(
            ErrorCode.FORBIDDEN, "A moderator has hidden this message. Ask one to show it again.", path="message_id"
        )
    if message.forwarded_from_id is not None:
        raise Refused(ErrorCode.FORBIDDEN, "A forwarded message cannot be edited. Send a new one.", path="message_id")
    window = found.conversation.settings.edit_window_seconds
    if window == 0:
        raise Refused(
            ErrorCode.FORBIDDEN, "Messages cannot be edited in this conversation. Send a new one.", path="message_id"
        )
    if window is not None and now() - message.created_at > timedelta(seconds=window):
        raise Refused(
            ErrorCode.FORBIDDEN,
            f"Messages can be edited for at most {window} seconds here. Send a new one.",
            path="message_id",
        )


def _require_nobody_voted(message: Message) -> None:
    """Raise Refused if a message is a poll that has votes or is closed, because its votes refer to its content."""
    if message.poll_voters or (isinstance(message.payload, Poll) and is_closed(message, message.payload)):
        raise Refused(
            ErrorCode.FORBIDDEN, "A poll that has votes or is closed cannot be edited. Send a new one.",
            path="message_id",
        )  # fmt: skip


async def delete(context: Context, frame: client.Delete) -> Changed:
    """Delete a message's content, and publish the deletion."""
    async with context.transaction() as db:
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
            await require_sender_not_above(db, found.me, before)
            deed = Deed(context.user_id, "delete_message", before.sender_id, before.id)
            await audit.record(db, before.conversation_id, deed)
        deleted = await edits.delete(db, before, context.user_id)
    return publish_deleted(context.events, deleted)


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
            found = await messages.page(
                db, frame.conversation_id, context.user_id, span, with_replies=frame.with_replies
            )
        except LookupError:
            side = next(name for name in ("before", "after", "around") if getattr(frame, name) is not None)
            raise NotFound(side) from None
    if found is None:
        raise NotFound("conversation_id")
    return await found.decoded()


async def get(context: Context, frame: client.GetMessage) -> OneMessage:
    """Return one message."""
    async with context.database.connection() as db:
        found = await messages.get(db, frame, context.user_id)
    if found is None:
        raise NotFound("message_id")
    return found


async def list_edits(context: Context, frame: client.ListEdits) -> EditPage:
    """Return a page of a message's earlier contents."""
    async with context.database.connection() as db:
        found = await edits.edits(db, frame, context.user_id, frame.after, limit=MAX_PAGE)
    if found is None:
        raise NotFound("message_id")
    page = await found.decoded()
    return EditPage(edits=page.rows, after=page.after)
