"""Receipts: up to which message each participant has read, and each client has received. Both are versions that only
grow. Unread counts and readers derive from them.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import asyncpg

from protocol.client import Delivered, MarkUnread, Read
from protocol.ids import ConversationId, MessageId, UserId
from protocol.server import MessageDelivered, MessageRead, Readers
from server.db.database import Db
from server.db.lock_timeouts import BRIEFLY
from server.db.rows import Reader
from server.queries.messages import REACHED, VISIBLE, MessageRef
from server.queries.presence import UNSEEN
from server.queries.unread import COUNT_UNREAD
from server.queries.users import MOVE_OWN

_readers_decoder = Reader(Readers)


IS_ACTIVE = """EXISTS (SELECT FROM "user" u WHERE u.id = $2 AND u.is_active AND NOT u.is_deleted)"""
"""Whether the user $2 is active. A socket may not know yet that its user is not."""


class Position(NamedTuple):
    """The caller's read position, and what the statement changed.

    `unread_count` counts the messages up to the conversation's version `version`. `revision` is the version of the
    position, and `mark_version` the user version at which the mark was last set or removed.
    """

    conversation_id: ConversationId
    message_id: MessageId
    revision: int
    unread_count: int
    version: int
    mark_version: int
    participant_count: int
    has_moved: bool
    preferences: str | None
    """The result of preferences_json(), if a mark was removed."""
    is_stale: bool
    """Whether another device changed the row meanwhile, so that the statement changed nothing and read an old row."""


# An unread mark is removed, too, and only for that the user is locked. The counting statement sees the row as before
# the update, so it gets the new position as a row. PostgreSQL evaluates the conditions on `p` again if the statement
# has waited for the row. Then the other columns are those of `target`, from before that.
READ = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.participant_count, c.version, p.last_read_message_id,
        p.last_read_version, p.user_version,
        p.last_read_version < m.sent_version OR p.unread_from_id IS NOT NULL AS must_move,
        p.unread_from_id IS NOT NULL AS is_marked
    {VISIBLE} AND {IS_ACTIVE} AND {BRIEFLY}
), touched AS (
    {MOVE_OWN} AND EXISTS (SELECT FROM target t WHERE t.is_marked) RETURNING version
), moved AS (
    UPDATE conversation_participant p
    SET last_read_message_id = CASE WHEN p.last_read_version < t.sent_version THEN t.id ELSE p.last_read_message_id END,
        last_read_version = greatest(p.last_read_version, t.sent_version), last_read_at = now(),
        unread_from_id = NULL, unread_from_version = NULL, user_version = coalesce(touched.version, p.user_version)
    FROM target t LEFT JOIN touched ON true
    WHERE p.conversation_id = $3 AND p.user_id = $2 AND p.status = 'active'
        AND (p.last_read_version < t.sent_version OR p.unread_from_id IS NOT NULL)
        AND (p.unread_from_id IS NULL OR touched.version IS NOT NULL)
    RETURNING p.last_read_message_id, p.last_read_version, p.user_version,
        CASE WHEN touched.version IS NOT NULL THEN preferences_json(p) END AS preferences
)
SELECT t.conversation_id, coalesce(moved.last_read_message_id, t.last_read_message_id, t.id), me.last_read_version,
    ({COUNT_UNREAD.format(me="me")}), t.version, coalesce(moved.user_version, t.user_version), t.participant_count,
    coalesce(moved.last_read_version > t.last_read_version, false), moved.preferences,
    t.must_move AND moved.last_read_version IS NULL
FROM target t LEFT JOIN moved ON true
CROSS JOIN LATERAL (
    SELECT $2 AS user_id, t.conversation_id, NULL::bigint AS unread_from_version,
        coalesce(moved.last_read_version, t.last_read_version) AS last_read_version
) me
"""  # noqa: S608 - only names are put in


async def read(db: Db, frame: Read, user_id: UserId) -> Position | None:
    """Move the read position to a message. Return None without access to it. Under the locks of the user and of
    `lock`, the result is never stale.
    """
    row = await db.fetchrow(READ, frame.message_id, user_id, frame.conversation_id)
    return None if row is None else Position(*row)


LOCK = "SELECT FROM conversation_participant WHERE conversation_id = $1 AND user_id = $2 FOR NO KEY UPDATE"


async def lock(db: Db, conversation_id: ConversationId, user_id: UserId) -> None:
    """Lock a user's positions in a conversation until the transaction ends. Requires the user's lock."""
    await db.execute(LOCK, conversation_id, user_id)


class Mark(NamedTuple):
    """The number of messages from the mark on, up to the conversation's version `version`, the user version of the
    mark, and the result of preferences_json().
    """

    unread_count: int
    version: int
    mark_version: int
    preferences: str


MARK_UNREAD = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.version {VISIBLE} AND {BRIEFLY}
), touched AS (
    {MOVE_OWN} AND is_active AND NOT is_deleted AND EXISTS (SELECT FROM target) RETURNING version
), marked AS (
    UPDATE conversation_participant p
    SET unread_from_id = t.id, unread_from_version = t.sent_version, user_version = touched.version
    FROM target t, touched
    WHERE p.conversation_id = $3 AND p.user_id = $2 AND p.status = 'active'
    RETURNING p.user_id, p.conversation_id, p.unread_from_version, p.last_read_version, p.user_version,
        preferences_json(p) AS preferences
)
SELECT ({COUNT_UNREAD.format(me="marked")}), t.version, marked.user_version, marked.preferences
FROM marked, target t
"""  # noqa: S608 - only names are put in


async def mark_unread(db: Db, frame: MarkUnread, user_id: UserId) -> Mark | None:
    """Mark a conversation as unread from a message on. Return None without access, or if the user is not active."""
    row = await db.fetchrow(MARK_UNREAD, frame.message_id, user_id, frame.conversation_id)
    return None if row is None else Mark(*row)


CONFIRMS = """(
    SELECT u.status <> 'invisible' AND u.show_online_status FROM "user" u WHERE u.id = {user}
)"""
"""Whether a user confirms the arrival of messages. A confirmation reveals that the user is online."""
BLIND = """ARRAY(
    SELECT r.user_id FROM (
        SELECT r.to_user_id AS user_id FROM user_relationship r
        WHERE r.from_user_id = {user} AND (NOT r.can_see_online_status OR (r.type = 'block' AND r.status = 'active'))
        UNION
        SELECT r.from_user_id FROM user_relationship r
        WHERE r.to_user_id = {user} AND r.type = 'block' AND r.status = 'active'
    ) r
    WHERE EXISTS (
        SELECT FROM conversation_participant o
        WHERE o.conversation_id = {conversation} AND o.user_id = r.user_id AND o.status = 'active' OFFSET 0
    )
)"""
"""The participants of a conversation who may not see the presence of a user, or the arrival of messages."""

# If some participants may not see the user's presence, `told` lists the others.
DELIVERED = f"""
WITH target AS (
    SELECT m.id, m.conversation_id, m.sent_version, c.participant_count {VISIBLE} AND {IS_ACTIVE} AND {BRIEFLY}
), moved AS (
    UPDATE conversation_participant p
    SET delivered_message_id = t.id, delivered_version = t.sent_version, delivered_at = now()
    FROM target t
    WHERE p.conversation_id = $3 AND p.user_id = $2 AND p.status = 'active'
        AND p.delivered_version < t.sent_version AND {CONFIRMS.format(user="$2")}
    RETURNING 1
)
SELECT t.participant_count, t.sent_version, EXISTS (SELECT FROM moved), CASE WHEN blind.ids <> '{{}}' THEN ARRAY(
    SELECT o.user_id FROM conversation_participant o
    WHERE o.conversation_id = t.conversation_id AND o.status = 'active' AND NOT o.user_id = ANY(blind.ids)
        AND t.participant_count <= $4
) END
FROM target t CROSS JOIN LATERAL (
    SELECT CASE WHEN EXISTS (SELECT FROM moved)
        THEN {BLIND.format(user="$2", conversation="t.conversation_id")} ELSE '{{}}' END AS ids
) blind
"""  # noqa: S608 - only names are put in


class Arrival(NamedTuple):
    """The number of participants, the version of the message, whether the position moved, and the users who may receive
    it, if not all may.
    """

    participant_count: int
    revision: int
    has_moved: bool
    told: list[UserId] | None


async def delivered(db: Db, frame: Delivered, user_id: UserId, *, most: int) -> Arrival | None:
    """Record that a client has received all messages up to one. Return None without access to it. In a conversation
    with more than `most` participants, `told` is empty unless all may receive it.
    """
    row = await db.fetchrow(DELIVERED, frame.message_id, user_id, frame.conversation_id, most)
    return None if row is None else Arrival(*row)


# OFFSET 0 keeps the planner from reading the whole table.
MOVED = f"""
SELECT c.id AS conversation_id, moved.* FROM conversation c LEFT JOIN LATERAL (
    SELECT p.user_id, CASE WHEN p.last_read_at > since.at THEN p.last_read_message_id END, p.last_read_version,
        CASE WHEN p.delivered_at > since.at AND {CONFIRMS.format(user="p.user_id")} THEN p.delivered_message_id END,
        p.delivered_version, CASE WHEN p.delivered_at > since.at
            THEN {BLIND.format(user="p.user_id", conversation="p.conversation_id")} ELSE '{{}}' END AS blind
    FROM conversation_participant p, (SELECT now() - make_interval(secs => $2) AS at) since
    WHERE p.conversation_id = c.id AND p.status = 'active' AND (p.last_read_at > since.at OR p.delivered_at > since.at)
        AND c.participant_count <= $3 OFFSET 0
) moved ON true
WHERE c.id = ANY($1) AND NOT c.is_deleted AND (moved.user_id IS NOT NULL OR c.participant_count > $3)
"""  # noqa: S608 - only names are put in


class Receipt(NamedTuple):
    """The event of a position, and the participants who may not receive it."""

    event: MessageRead | MessageDelivered
    blind: Collection[UserId]


class Moved(NamedTuple):
    """Positions that have moved, and the conversations whose positions are not shared. Making all receipts would block
    the loop for milliseconds, so they are made one by one.
    """

    receipts: Iterator[Receipt]
    crowds: list[ConversationId]


async def moved(db: Db, conversation_ids: Sequence[ConversationId], *, seconds: float, most: int) -> Moved:
    """Return the positions that have moved within the last `seconds`, in conversations with at most `most`
    participants. The time of a position is the start of its statement. Arrivals at clients of users who are invisible
    by now are left out.
    """
    rows = await db.fetch(MOVED, conversation_ids, seconds, most)
    receipts = (
        Receipt(event, row["blind"] if isinstance(event, MessageDelivered) else ())
        for row in rows
        if row["user_id"] is not None
        for event in _events(row)
    )
    return Moved(receipts, [row["conversation_id"] for row in rows if row["user_id"] is None])


MOVED_OF = """
SELECT p.conversation_id, p.user_id, CASE WHEN p.last_read_at > since.at THEN p.last_read_message_id END,
    p.last_read_version, CASE WHEN p.delivered_at > since.at THEN p.delivered_message_id END, p.delivered_version
FROM (SELECT now() - make_interval(secs => $3) AS at) since,
    unnest($1::uuid[], $2::uuid[]) AS own (conversation_id, user_id)
JOIN conversation_participant p ON p.conversation_id = own.conversation_id AND p.user_id = own.user_id
WHERE p.status = 'active' AND (p.last_read_at > since.at OR p.delivered_at > since.at)
"""


async def moved_of(
    db: Db, pairs: Sequence[tuple[ConversationId, UserId]], *, seconds: float
) -> list[MessageRead | MessageDelivered]:
    """Return the positions of these participants that have moved within the last `seconds`, for their own devices."""
    rows = await db.fetch(MOVED_OF, [one for one, _ in pairs], [user_id for _, user_id in pairs], seconds)
    return [event for row in rows for event in _events(row)]


def _events(row: asyncpg.Record) -> Iterator[MessageRead | MessageDelivered]:
    conversation_id, user_id, read_id, read_revision, delivered_id, delivered_revision = row[:6]
    if read_id is not None:
        yield MessageRead(conversation_id=conversation_id, user_id=user_id, message_id=read_id, revision=read_revision)
    if delivered_id is not None:
        yield MessageDelivered(
            conversation_id=conversation_id, user_id=user_id, message_id=delivered_id, revision=delivered_revision
        )


TAKEN_IN = f"""CASE WHEN {{who}}.user_id = ANY({UNSEEN}) THEN {{who}}.last_read_version
    ELSE greatest({{who}}.delivered_version, {{who}}.last_read_version) END"""
"""The version up to which the participant `{who}` has received messages, as far as the user $2 may know it."""

# Read messages count as delivered. With more than $4 participants, readers are counted and not listed.
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


async def readers(db: Db, ref: MessageRef, user_id: UserId, *, most: int) -> Readers | None:
    """Return the readers of a message, listed by user if at most `most` participate. Return None without access."""
    text = await db.fetchval(READERS, ref.message_id, user_id, ref.conversation_id, most)
    return None if text is None else _readers_decoder.decode(text)
