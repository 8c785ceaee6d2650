"""Polls: vote, close, list votes."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.payloads import Poll
from protocol.roles import Act
from protocol.server import Changed, MessageChanged, PollVoted, VotePage
from server.context import Context
from server.core.errors import NotFound
from server.domain import batched_changes
from server.domain.permissions import require, require_may_send, require_sender_not_above
from server.domain.publish import publish_changed
from server.queries import audit, messages, polls
from server.queries.audit import Deed
from server.queries.messages import FoundMessage
from server.queries.polls import VoteRequest


def _no_poll() -> Refused:
    return Refused(
        ErrorCode.CONFLICT, "This message is not a poll. Choose one whose `content_type` is `poll`.", path="message_id"
    )


REFUSALS: batched_changes.Refusals = {
    **batched_changes.REFUSALS,
    "no_poll": lambda _: _no_poll(),
    "closed": lambda _: Refused(
        ErrorCode.FORBIDDEN, "This poll is closed. Read its counts in the message.", path="message_id"
    ),
    "unknown_option": lambda outcome: Refused(
        ErrorCode.INVALID, f"`options` must be between 0 and {outcome.option_count - 1}.", path="options"
    ),
    "too_many_options": lambda _: Refused(
        ErrorCode.INVALID, "This poll allows one option per vote. Choose one.", path="options"
    ),
}


async def vote(context: Context, frame: client.Vote) -> Changed:
    """Replace the caller's vote, and publish the counts. A repetition changes nothing. Withdrawing needs no permission
    to send.
    """
    about, message_id, options = frame.conversation_id, frame.message_id, sorted(frame.options)
    request = VoteRequest(about, message_id, context.user_id, options)
    voted = await batched_changes.change(context.services.votes, request, REFUSALS)
    if voted.poll_counts is not None and voted.is_from_before:
        context.events.publish(MessageChanged(conversation_id=about, version=voted.version, message_id=message_id))
    elif voted.poll_counts is not None:
        context.events.publish(
            PollVoted(
                conversation_id=about,
                version=voted.version,
                message_id=message_id,
                poll_counts=voted.poll_counts,
                poll_voters=voted.poll_voters,
                user_id=None if voted.is_anonymous else context.user_id,
                options=None if voted.is_anonymous else options,
            )
        )
    return Changed(conversation_id=about, version=voted.version)


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
        raise _no_poll()
    if not isinstance(found.message.payload, Poll):
        raise NotFound("message_id")
    return found.message.payload
