"""Remains of deleted objects: reactions and votes of messages, drafts in conversations, and invitations to them. No
query shows them. A job deletes reactions and votes, empties drafts and ends invitations, without locks on
conversations. A conversation without participants counts as deleted.
"""

from typing import NamedTuple
from uuid import UUID

from protocol.ids import ConversationId, MessageId, UserId
from server.db.database import Db
from server.queries import drafts, invitations
from server.queries.participants import OUTSIDER

MAX_ROWS = 500
"""Max messages or conversations that one statement reads, and max reactions or votes that it deletes."""
USERS_AT_ONCE = 100
"""Max drafts that one statement empties, or invitations that it ends, and users whom it locks."""

# A deleted message gets no further ones, so none is added meanwhile.
DUE = "SELECT m.id FROM message m WHERE m.has_remains ORDER BY m.id LIMIT $1"
# Rows that another worker is deleting are skipped.
UNREACT = """
WITH gone AS MATERIALIZED (
    SELECT o.message_id, o.user_id, o.emoji FROM message_reaction o WHERE o.message_id = ANY($1)
    LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM message_reaction r USING gone
WHERE r.message_id = gone.message_id AND r.user_id = gone.user_id AND r.emoji = gone.emoji
RETURNING 1
"""
WITHDRAW = """
WITH gone AS MATERIALIZED (
    SELECT o.message_id, o.user_id FROM poll_vote o WHERE o.message_id = ANY($1) LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM poll_vote v USING gone
WHERE v.message_id = gone.message_id AND v.user_id = gone.user_id
RETURNING 1
"""
# A message that another transaction changes, such as the root of a thread, is left to a later run.
DONE = """
UPDATE message m SET has_remains = false FROM (
    SELECT o.id FROM message o WHERE o.id = ANY($1) FOR NO KEY UPDATE SKIP LOCKED
) free
WHERE m.id = free.id AND NOT EXISTS (SELECT FROM message_reaction r WHERE r.message_id = m.id OFFSET 0)
    AND NOT EXISTS (SELECT FROM poll_vote v WHERE v.message_id = m.id OFFSET 0)
RETURNING m.id
"""


async def clear(db: Db) -> bool:
    """Delete some remains of deleted messages. Return whether there may be more."""
    due = [MessageId(row[0]) for row in await db.fetch(DUE, MAX_ROWS)]
    if not due:
        return False
    gone = len(await db.fetch(UNREACT, due, MAX_ROWS)) + len(await db.fetch(WITHDRAW, due, MAX_ROWS))
    done = len(await db.fetch(DONE, due))
    # If nothing was done, other workers are deleting all of it, and continue.
    return gone + done > 0


DELETED = "SELECT c.id FROM conversation c WHERE c.has_remains ORDER BY c.id LIMIT $1"
# An ended conversation gets no new drafts or invitations, so none is added meanwhile.
EMPTIED = f"""
UPDATE conversation c SET has_remains = false FROM (
    SELECT o.id FROM conversation o WHERE o.id = ANY($1) FOR NO KEY UPDATE SKIP LOCKED
) free
WHERE c.id = free.id
    AND NOT EXISTS (SELECT FROM draft d WHERE d.conversation_id = c.id AND d.content <> '' OFFSET 0)
    AND NOT EXISTS (
        SELECT FROM conversation_participant p WHERE {OUTSIDER} = 'invited' AND p.conversation_id = c.id OFFSET 0
    )
RETURNING c.id
"""  # noqa: S608 - OUTSIDER is a constant


# A worker of the release before migration 0066, which may run beside this one, removes the mark although invitations
# remain. This repairs that by the index of all invitations, a portion at a time.
MARK = f"""
WITH seen AS MATERIALIZED (
    SELECT p.conversation_id AS id FROM conversation_participant p
    WHERE {OUTSIDER} = 'invited' AND p.conversation_id > $1 ORDER BY p.conversation_id LIMIT $2
), marked AS (
    UPDATE conversation c SET has_remains = true FROM (
        SELECT o.id FROM conversation o WHERE o.id IN (SELECT s.id FROM seen s)
            AND (o.is_deleted OR NOT o.is_active) AND NOT o.has_remains FOR NO KEY UPDATE SKIP LOCKED
    ) free WHERE c.id = free.id
)
SELECT s.id FROM seen s ORDER BY s.id
"""  # noqa: S608 - OUTSIDER is a constant
FIRST = ConversationId(UUID(int=0))
"""`mark` begins after this id."""


async def mark(db: Db, after: ConversationId) -> ConversationId:
    """Mark some of the ended conversations with invitations and without a mark for `empty`. Return the id after which
    to continue, or `FIRST` at the end.
    """
    rows = await db.fetch(MARK, after, MAX_ROWS)
    return ConversationId(rows[-1][0]) if len(rows) == MAX_ROWS else FIRST


class Emptied(NamedTuple):
    """The users whose drafts were emptied or invitations ended, and whether there may be more."""

    user_ids: list[UserId]
    is_more_due: bool


async def empty(db: Db) -> Emptied:
    """Empty some drafts in ended conversations, and end some invitations to them."""
    due = [ConversationId(row[0]) for row in await db.fetch(DELETED, MAX_ROWS)]
    emptied: list[UserId] = []
    for conversation_id in due:
        emptied += await drafts.empty_some(db, conversation_id, limit=USERS_AT_ONCE)
        emptied += await invitations.end(db, conversation_id, limit=USERS_AT_ONCE)
        if len(emptied) >= USERS_AT_ONCE:
            break
    done = len(await db.fetch(EMPTIED, due)) if due else 0
    # If nothing was done, all users are locked, and a later run continues.
    return Emptied(emptied, bool(emptied) or done > 0)
