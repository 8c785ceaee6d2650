"""Polls: vote, close, list votes."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.payloads import Poll
from protocol.roles import Act
from protocol.server import Changed, MessageChanged, PollVoted, VotePage
from server.context import Context
from server.core.errors import NotFound
from server.domain.compose import is_closed
from server.domain.permissions import require, require_may_send, require_sender_not_above
from server.domain.publish import publish_changed
from server.queries import audit, messages, polls
from server.queries.audit import Deed
from server.queries.messages import FoundMessage


async def vote(context: Context, frame: client.Vote) -> Changed:
    """Replace the caller's vote, and publish the counts."""
    options = sorted(frame.options)
    async with context.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        poll = _poll(found)
        assert found is not None  # noqa: S101 - `_poll` raises for None
        message = found.message
        about = message.conversation_id
        before, version = await polls.voted(db, message, context.user_id)
        if before == options:
            return Changed(conversation_id=about, version=version)
        if options:  # a withdrawal reaches nobody as a message does
            require_may_send(found)
        if is_closed(message, poll):
            raise Refused(
                ErrorCode.FORBIDDEN, "This poll is closed. Read its counts in the message.", path="message_id"
            )
        if options and options[-1] >= len(poll.options):
            raise Refused(
                ErrorCode.INVALID, f"`options` must be between 0 and {len(poll.options) - 1}.", path="options"
            )
        if len(options) > 1 and not poll.is_multiple:
            raise Refused(ErrorCode.INVALID, "This poll allows one option per vote. Choose one.", path="options")
        standing = await polls.vote(db, message, context.user_id, options)
    if found.is_from_before:
        context.events.publish(
            MessageChanged(conversation_id=about, version=standing.version, message_id=frame.message_id)
        )
    else:
        context.events.publish(
            PollVoted(
                conversation_id=about,
                version=standing.version,
                message_id=frame.message_id,
                poll_counts=standing.poll_counts,
                poll_voters=standing.poll_voters,
                user_id=None if poll.is_anonymous else context.user_id,
                options=None if poll.is_anonymous else options,
            )
        )
    return Changed(conversation_id=about, version=standing.version)


async def close(context: Context, frame: client.ClosePoll) -> Changed:
    """Close the caller's own poll, or with the permission to delete messages anyone's."""
    async with context.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        _poll(found)
        assert found is not None  # noqa: S101 - `_poll` raises for None
        before = found.message
        is_own = before.sender_id == context.user_id
        if not is_own:
            require(found.me, Act.DELETE_MESSAGES)
        if before.poll_closed_at is not None:
            return Changed(conversation_id=before.conversation_id, version=before.version)
        if is_own:
            require_may_send(found)
        else:
            await require_sender_not_above(db, found.me, before)
            deed = Deed(context.user_id, "close_poll", before.sender_id, before.id)
            await audit.record(db, before.conversation_id, deed)
        message = await polls.close(db, before)
    return publish_changed(context.events, found, message)


async def list_votes(context: Context, frame: client.ListVotes) -> VotePage:
    """Return a page of a poll's votes."""
    async with context.database.connection() as db:
        found = await polls.votes(db, frame, frame.after, limit=frame.limit)
        # Checked last, so that a caller who may read now may read all of the result.
        if _poll(await messages.find(db, frame, context.user_id)).is_anonymous:
            raise Refused(
                ErrorCode.FORBIDDEN, "This poll is anonymous. Read its counts in the message.", path="message_id"
            )
    page = await found.decoded()
    return VotePage(votes=page.rows, after=page.after)


def _poll(found: FoundMessage | None) -> Poll:
    """Return the poll in a message. Raises NotFound if the message is deleted, and Refused if it is no poll."""
    if found is None or found.message.is_deleted:
        raise NotFound("message_id")
    if found.message.content_type != "poll":
        raise Refused(
            ErrorCode.CONFLICT,
            "This message is not a poll. Choose one whose `content_type` is `poll`.",
            path="message_id",
        )
    if not isinstance(found.message.payload, Poll):
        raise NotFound("message_id")
    return found.message.payload
