"""Polls, with a row per voter. The same statement changes the counts in the message."""

from typing import NamedTuple

from protocol.ids import UserId
from protocol.values import Message, PollVote
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.messages import MessageRef

_message_decoder = Reader(Message)
_vote_decoder = Reader(PollVote)


class Standing(NamedTuple):
    """A poll after a vote: the vote's version, the number of votes per option, and the number of voters."""

    version: int
    poll_counts: list[int]
    poll_voters: int


# The earlier vote is read under the conversation's lock, so it is the one that is replaced. Arrays begin at 1.
VOTE = """
WITH before AS MATERIALIZED (
    SELECT coalesce((
        SELECT v.options FROM poll_vote v
        WHERE v.message_id = $2 AND v.user_id = $3 AND (v.conversation_id = $1) IS TRUE
    ), '{}') AS options
), bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
), voted AS (
    INSERT INTO poll_vote AS v (message_id, user_id, conversation_id, options, version)
    SELECT $2, $3, $1, $4::integer[], b.version FROM bumped b
    ON CONFLICT (message_id, user_id) DO UPDATE SET options = excluded.options, version = excluded.version,
        voted_at = now()
)
UPDATE message m SET
    poll_counts = ARRAY(
        SELECT m.poll_counts[n] + (n - 1 = ANY($4))::integer - (n - 1 = ANY(before.options))::integer
        FROM generate_subscripts(m.poll_counts, 1) AS n ORDER BY n
    ),
    poll_voters = m.poll_voters + (cardinality($4) > 0)::integer - (cardinality(before.options) > 0)::integer
FROM bumped b, before WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING b.version, m.poll_counts, m.poll_voters
"""
VOTED = """
SELECT v.options, v.version FROM poll_vote v
WHERE v.message_id = $1 AND v.user_id = $2 AND (v.conversation_id = $3) IS TRUE
"""


async def vote(db: Db, found: Message, user_id: UserId, options: list[int]) -> Standing:
    """Replace a vote. Without options, withdraw it. Requires the conversation's lock."""
    row = await db.fetchrow(VOTE, found.conversation_id, found.id, user_id, options)
    assert row is not None  # noqa: S101 - the caller has found it under the lock
    return Standing(*row)


async def voted(db: Db, found: Message, user_id: UserId) -> tuple[list[int], int]:
    """Return a user's vote and its version. Without a vote, return no options and the version of the message."""
    row = await db.fetchrow(VOTED, found.id, user_id, found.conversation_id)
    return ([], found.version) if row is None else (row[0], row[1])


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
    AND ($3::uuid IS NULL OR v.user_id > $3)
ORDER BY v.user_id LIMIT $4
"""


async def votes(db: Db, ref: MessageRef, after: UserId | None, *, limit: int) -> Undecoded[Page[PollVote]]:
    """Return up to `limit` votes in a poll, by user. There is no access check."""
    rows = await db.fetch(VOTES, ref.message_id, ref.conversation_id, after, limit + 1)
    return _vote_decoder.page(rows, limit)
