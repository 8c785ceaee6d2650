"""Read positions: one number for each participant, which only grows. Unread and read-by follow from it."""

from typing import NamedTuple

from protocol.client import Read
from protocol.ids import ConversationId, MessageId, UserId
from server.database import Db
from server.queries.messages import COUNT_UNREAD


class Position(NamedTuple):
    """Where the caller's read position is now, and whether it moved."""

    conversation_id: ConversationId
    message_id: MessageId
    unread_count: int
    participant_count: int
    has_moved: bool


# The second half sees the row as it was before the first: when nothing moved, that is as it is.
READ = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.participant_count
    FROM message m
    JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
    JOIN conversation_participant p
        ON p.conversation_id = m.conversation_id AND p.user_id = $2 AND p.status = 'active'
    WHERE m.id = $1 AND (m.conversation_id = $3) IS TRUE AND m.sent_version > visible_after(c, p)
), moved AS (
    UPDATE conversation_participant p
    SET last_read_message_id = t.id, last_read_version = t.sent_version, last_read_at = now()
    FROM target t
    WHERE p.conversation_id = t.conversation_id AND p.user_id = $2 AND p.status = 'active'
        AND p.last_read_version < t.sent_version
    RETURNING p.last_read_version
)
SELECT t.conversation_id, coalesce(CASE WHEN moved.last_read_version IS NULL THEN p.last_read_message_id END, t.id),
    ({
    COUNT_UNREAD.format(
        user="$2", conversation="t.conversation_id", read="coalesce(moved.last_read_version, p.last_read_version)"
    )
}),
    t.participant_count, moved.last_read_version IS NOT NULL
FROM target t
JOIN conversation_participant p
    ON p.conversation_id = t.conversation_id AND p.user_id = $2 AND p.status = 'active'
LEFT JOIN moved ON true
"""  # noqa: S608 - only column references are put in


async def read(db: Db, frame: Read, user_id: UserId) -> Position | None:
    """Move the read position forward to a message; None without access to it."""
    row = await db.fetchrow(READ, frame.message_id, user_id, frame.conversation_id)
    return None if row is None else Position(*row)
