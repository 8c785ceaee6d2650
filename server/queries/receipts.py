"""Receipts: how far each participant has read, and how far a client of theirs has taken in what was sent. Both are one
number that only grows. Unread and read-by follow from it.
"""

from typing import NamedTuple

from protocol.client import Delivered, MarkUnread, Read
from protocol.ids import ConversationId, MessageId, UserId
from protocol.server import Readers
from server.db.database import Db
from server.db.rows import Reader
from server.queries.messages import REACHED, VISIBLE, MessageRef
from server.queries.unread import COUNT_UNREAD
from server.queries.users import UNSEEN

_readers_decoder = Reader(Readers)


IS_ACTIVE = """EXISTS (SELECT FROM "user" u WHERE u.id = $2 AND u.is_active AND NOT u.is_deleted)"""
"""Whether the user $2 is active, whose socket may not have heard that they are not."""


class Position(NamedTuple):
    """Where the caller's read position is now, whether it moved, and whether something is marked as unread: that was
    read, or under no lock, is still to be read under the user's.
    """

    conversation_id: ConversationId
    message_id: MessageId
    unread_count: int
    participant_count: int
    has_moved: bool
    was_marked: bool


# What is marked as unread is read, too. The statement that counts sees the row as it was before, so the position is
# told to it as if it were the row.
READ = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.participant_count {VISIBLE} AND {IS_ACTIVE}
), moved AS (
    UPDATE conversation_participant p
    SET last_read_message_id = CASE WHEN p.last_read_version < t.sent_version THEN t.id ELSE p.last_read_message_id END,
        last_read_version = greatest(p.last_read_version, t.sent_version), last_read_at = now(),
        unread_from_id = NULL, unread_from_version = NULL
    FROM target t
    WHERE p.conversation_id = t.conversation_id AND p.user_id = $2 AND p.status = 'active'
        AND (p.last_read_version < t.sent_version OR p.unread_from_id IS NOT NULL) AND (p.unread_from_id IS NULL OR $4)
    RETURNING p.last_read_version, p.last_read_message_id
)
SELECT me.conversation_id, coalesce(moved.last_read_message_id, before.last_read_message_id, t.id),
    ({COUNT_UNREAD.format(me="me")}), t.participant_count,
    coalesce(moved.last_read_version > before.last_read_version, false),
    CASE WHEN $4 THEN moved.last_read_version IS NOT NULL AND before.unread_from_id IS NOT NULL
        ELSE moved.last_read_version IS NULL
            AND (before.unread_from_id IS NOT NULL OR before.last_read_version < t.sent_version) END
FROM target t
JOIN conversation_participant before
    ON before.conversation_id = t.conversation_id AND before.user_id = $2 AND before.status = 'active'
LEFT JOIN moved ON true
CROSS JOIN LATERAL (
    SELECT before.user_id, before.conversation_id, NULL::bigint AS unread_from_version,
        coalesce(moved.last_read_version, before.last_read_version) AS last_read_version
) me
"""  # noqa: S608 - only names are put in


async def read(db: Db, frame: Read, user_id: UserId, *, is_locked: bool = False) -> Position | None:
    """Move the read position forward to a message; None without access to it. What is marked as unread takes the user's
    lock, for it moves their own clock.
    """
    row = await db.fetchrow(READ, frame.message_id, user_id, frame.conversation_id, is_locked)
    return None if row is None else Position(*row)


MARK_UNREAD = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version {VISIBLE}
), marked AS (
    UPDATE conversation_participant p SET unread_from_id = t.id, unread_from_version = t.sent_version
    FROM target t
    WHERE p.conversation_id = t.conversation_id AND p.user_id = $2 AND p.status = 'active'
    RETURNING p.user_id, p.conversation_id, p.unread_from_version, p.last_read_version
)
SELECT ({COUNT_UNREAD.format(me="marked")}) FROM marked
"""  # noqa: S608 - only names are put in


async def mark_unread(db: Db, frame: MarkUnread, user_id: UserId) -> int | None:
    """Have a conversation count as unread from a message on; return how much that is, None without access.
    Under the user's lock.
    """
    count = await db.fetchval(MARK_UNREAD, frame.message_id, user_id, frame.conversation_id)
    return None if count is None else int(count)


# An invisible user confirms nothing: that would tell that they are here. Where a participant may not see the user's
# presence, `told` are the others.
DELIVERED = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.participant_count {VISIBLE} AND {IS_ACTIVE}
), moved AS (
    UPDATE conversation_participant p
    SET delivered_message_id = t.id, delivered_version = t.sent_version, delivered_at = now()
    FROM target t
    WHERE p.conversation_id = t.conversation_id AND p.user_id = $2 AND p.status = 'active'
        AND p.delivered_version < t.sent_version AND EXISTS (
            SELECT FROM "user" u WHERE u.id = $2 AND u.status <> 'invisible' AND u.show_online_status
        )
    RETURNING 1
)
SELECT t.participant_count, EXISTS (SELECT FROM moved), CASE WHEN blind.ids <> '{{}}' THEN ARRAY(
    SELECT o.user_id FROM conversation_participant o
    WHERE o.conversation_id = t.conversation_id AND o.status = 'active' AND NOT o.user_id = ANY(blind.ids)
        AND t.participant_count <= $4
) END
FROM target t CROSS JOIN LATERAL (
    SELECT CASE WHEN EXISTS (SELECT FROM moved) THEN ARRAY(
        SELECT o.user_id FROM (
            SELECT r.to_user_id AS user_id FROM user_relationship r
            WHERE r.from_user_id = $2 AND (NOT r.can_see_online_status OR (r.type = 'block' AND r.status = 'active'))
            UNION
            SELECT r.from_user_id FROM user_relationship r
            WHERE r.to_user_id = $2 AND r.type = 'block' AND r.status = 'active'
        ) r
        JOIN conversation_participant o ON o.conversation_id = t.conversation_id AND o.user_id = r.user_id
            AND o.status = 'active'
    ) ELSE '{{}}' END AS ids
) blind
"""  # noqa: S608 - VISIBLE is a constant


class Arrival(NamedTuple):
    """How many take part, whether the position moved, and who may be told of it if not everyone."""

    participant_count: int
    has_moved: bool
    told: list[UserId] | None


async def delivered(db: Db, frame: Delivered, user_id: UserId, *, most: int) -> Arrival | None:
    """Note that a client has taken in everything up to a message; None without access to it. In a crowd of more than
    `most` nobody is named who may be told.
    """
    row = await db.fetchrow(DELIVERED, frame.message_id, user_id, frame.conversation_id, most)
    return None if row is None else Arrival(*row)


TAKEN_IN = f"""CASE WHEN {{who}}.user_id = ANY({UNSEEN}) THEN {{who}}.last_read_version
    ELSE greatest({{who}}.delivered_version, {{who}}.last_read_version) END"""
"""How far the participant `{who}` has taken in what was sent, as far as the user $2 may know it."""

# Whoever has read something has taken it in. In a crowd ($4 people) nobody is named.
READERS = f"""
SELECT json_build_object('type', 'readers', 'is_crowd', c.participant_count > $4,
    'read_by', {REACHED.format(position="o.last_read_version")},
    'delivered_to', {REACHED.format(position=TAKEN_IN.format(who="o"))},
    'readers', CASE WHEN c.participant_count > $4 THEN '[]' ELSE coalesce((
        SELECT json_agg(json_build_object('user_id', o.user_id, 'read_at', o.last_read_at) ORDER BY o.last_read_at)
        FROM conversation_participant o
        WHERE o.conversation_id = m.conversation_id AND o.status = 'active' AND o.user_id <> m.sender_id
            AND o.last_read_version >= m.sent_version AND o.joined_version < m.sent_version
    ), '[]') END)
{VISIBLE}
"""  # noqa: S608 - VISIBLE is a constant


async def readers(db: Db, place: MessageRef, user_id: UserId, *, most: int) -> Readers | None:
    """Return who has read a message, named where at most `most` take part; None without access."""
    text = await db.fetchval(READERS, place.message_id, user_id, place.conversation_id, most)
    return None if text is None else _readers_decoder.decode(text)
