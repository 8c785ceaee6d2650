"""Polls, with a row per voter. The same statement changes the counts in the message."""

from functools import partial
from typing import Any, Literal, NamedTuple

from protocol.ids import UserId
from protocol.values import Message, PollVote
from server.db.database import Db
from server.db.lock_timeouts import WITHIN_RETRY_LOCK_MS
from server.db.rows import FIRST, Page, Reader, Undecoded
from server.queries.batched_changes import ChangeFunction, MessageChangeRequest, NotChanged
from server.queries.batches import Query
from server.queries.messages import MessageRef

_message_decoder = Reader(Message)
_vote_decoder = Reader(PollVote)


class VoteRequest(MessageChangeRequest, frozen=True):
    """A vote to store. `options` are in ascending order; none withdraw the vote."""

    options: list[int]


class Voted(NamedTuple):
    """The version of a vote, and the poll after it: the number of votes per option, and the number of voters.

    `poll_counts` is None if nothing changed. `is_from_before` tells that some participants joined later and may not see
    the poll.
    """

    version: int
    poll_counts: list[int] | None
    poll_voters: int
    is_anonymous: bool
    is_from_before: bool


Reason = Literal[
    "changed", "missing", "no_poll", "inactive", "archived", "role", "unwanted", "slow", "closed", "unknown_option",
    "too_many_options",
]  # fmt: skip
"""Why a vote was not stored. Of several reasons, it is the first one in change_votes()."""


CHANGE = f"SELECT * FROM change_votes($1, $2, $3) WHERE {WITHIN_RETRY_LOCK_MS}"  # noqa: S608 - as in `sending.SEND`
"""Stores a batch. schema.sql has the function."""


def _call(db: Db, requests: str) -> Query:
    return partial(db.fetch, CHANGE, requests)


def _outcome(
    outcome: str,
    wait_ms: int | None,
    option_count: int | None,
    *voted: Any,  # noqa: ANN401 - columns
) -> Voted | NotChanged:
    match outcome:
        case "stored":
            return Voted(*voted)
        case "unchanged":
            return Voted(*voted)._replace(poll_counts=None)
        case _:
            return NotChanged(outcome, wait_ms or 0, option_count or 0)


FUNCTION: ChangeFunction[VoteRequest, Voted] = ChangeFunction(_call, outcome=_outcome)
"""Stores, changes and withdraws votes."""


CLOSE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
)
UPDATE message m SET poll_closed_at = now(), version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""


async def close(db: Db, found: Message) -> Message:
    """Close a poll, and return its message. Requires the conversation's lock."""
    return _message_decoder.decode(await db.fetchval(CLOSE, found.conversation_id, found.id))


VOTES = """
SELECT json_build_object('user_id', v.user_id, 'options', v.options, 'voted_at', v.voted_at), v.user_id
FROM poll_vote v
WHERE v.message_id = $1 AND (v.conversation_id = $2) IS TRUE AND v.options <> '{}'
    AND v.user_id > $3
ORDER BY v.user_id LIMIT $4
"""


async def votes(db: Db, ref: MessageRef, after: UserId | None, *, limit: int) -> Undecoded[Page[PollVote]]:
    """Return up to `limit` votes in a poll, by user. There is no access check."""
    rows = await db.fetch(VOTES, ref.message_id, ref.conversation_id, after or FIRST, limit + 1)
    return _vote_decoder.page(rows, limit)
