"""Relationships: friends, blocks, follows, mutes. Each change moves the user versions of those who may see it."""

from datetime import timedelta
from typing import NamedTuple

import msgspec

from protocol.client import ListRelationships
from protocol.ids import UserId
from protocol.values import Relationship, RelationshipEntry, RelationshipKind, RelationshipStatus
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries import users
from server.queries.users import FACE

MAX_DELETED = 1_000
"""Max relationships that one statement deletes."""
KEPT = timedelta(days=90)
"""Min age of an ended relationship before its row is deleted."""

_relationship_decoder = Reader(Relationship)
_entry_decoder = Reader(RelationshipEntry)

BLANK = """(r.status = 'inactive' AND r.request_message IS NULL AND r.response_message IS NULL AND r.accepted_at IS NULL
    AND r.can_see_online_status AND r.can_send_messages AND r.can_see_profile AND r.notifications_enabled)"""
"""Whether a relationship has ended and contains nothing else."""

# A change between two users locks their direct conversation, where it affects who may write, and then both users.
# The update changes no value. It shows a message that is being sent that it has to check again (SEND_PLAIN).
LOCK_DIRECT = """
UPDATE conversation SET is_active = is_active
WHERE direct_low = least($1::uuid, $2) AND direct_high = greatest($1::uuid, $2)
"""


async def lock(db: Db, one: UserId, other: UserId) -> set[UserId]:
    """Lock the relationships of two users until the transaction ends. Return the active ones of the two."""
    await db.execute(LOCK_DIRECT, one, other)
    return await users.lock(db, [one, other])


STATUS = "SELECT status FROM user_relationship WHERE from_user_id = $1 AND to_user_id = $2 AND type = $3"


async def status(db: Db, one: UserId, other: UserId, kind: RelationshipKind) -> RelationshipStatus | None:
    """Return the status of a user's relationship to another one. Return None if there never was one."""
    found: RelationshipStatus | None = await db.fetchval(STATUS, one, other, kind)
    return found


GET = """
SELECT relationship_json(r, $4) FROM user_relationship r
WHERE r.from_user_id = $1 AND r.to_user_id = $2 AND r.type = $3 AND r.status = $5
"""


async def get(db: Db, one: UserId, other: UserId, change: "RelationshipChange", viewer: UserId) -> Relationship | None:
    """Return a user's relationship to another one, as `viewer` sees it, if it has the status of `change`."""
    text = await db.fetchval(GET, one, other, change.kind, viewer, change.status)
    return None if text is None else _relationship_decoder.decode(text)


class RelationshipChange(NamedTuple):
    """A change of a relationship: its status, and the texts of a request and its answer."""

    kind: RelationshipKind
    status: RelationshipStatus
    request_message: str | None = None
    response_message: str | None = None


# A new request replaces the texts, and an answer keeps them. A blocked user is not notified, not even by the user
# version. Moving `hidden_version` rechecks whom the blocked user watches.
SET = """
WITH touched AS (
    UPDATE "user" SET version = version + (id = $1 OR $3 <> 'block')::integer,
        hidden_version = hidden_version + (id = $2 AND $3 = 'block')::integer
    WHERE id = $1 OR (id = $2 AND $3 <> 'mute') RETURNING id, version
)
INSERT INTO user_relationship AS r (from_user_id, to_user_id, type, status, request_message, response_message,
    accepted_at, from_version, to_version)
SELECT $1, $2, $3, $4, $5, $6, CASE WHEN $4 = 'accepted' THEN now() END,
    (SELECT version FROM touched WHERE id = $1), coalesce((SELECT version FROM touched WHERE id = $2), 0)
ON CONFLICT (from_user_id, to_user_id, type) DO UPDATE SET
    status = excluded.status,
    request_message = CASE WHEN excluded.status = 'pending' THEN excluded.request_message ELSE r.request_message END,
    response_message = CASE WHEN excluded.status = 'pending' THEN NULL
        ELSE coalesce(excluded.response_message, r.response_message) END,
    accepted_at = coalesce(excluded.accepted_at, r.accepted_at), updated_at = now(),
    from_version = excluded.from_version, to_version = excluded.to_version
RETURNING relationship_json(r, $7)
"""


async def put(db: Db, one: UserId, other: UserId, change: RelationshipChange, viewer: UserId) -> Relationship:
    """Create or change a user's relationship to another one. Return it as `viewer` sees it. Requires the lock."""
    return _relationship_decoder.decode(await db.fetchval(SET, one, other, *change, viewer))


# A request or a follow by the other user stays. Only the other user can end it, so its end would reveal a block.
END = """
WITH ended AS (
    SELECT id FROM user_relationship
    WHERE type = $3 AND (from_user_id = $1 AND to_user_id = $2 AND status IN ('pending', 'accepted', 'active')
        OR from_user_id = $2 AND to_user_id = $1 AND status = 'accepted')
), touched AS (
    UPDATE "user" SET version = version + 1 WHERE id IN ($1, $2) AND EXISTS (SELECT FROM ended)
    RETURNING id, version
)
UPDATE user_relationship r SET status = 'inactive', updated_at = now(),
    from_version = (SELECT version FROM touched WHERE id = r.from_user_id),
    to_version = (SELECT version FROM touched WHERE id = r.to_user_id)
FROM ended WHERE r.id = ended.id
"""


MAY_END = """
SELECT EXISTS (
    SELECT FROM user_relationship
    WHERE type = $3 AND (from_user_id = $1 AND to_user_id = $2 AND status IN ('pending', 'accepted', 'active')
        OR from_user_id = $2 AND to_user_id = $1 AND status = 'accepted')
)
"""


async def may_end(db: Db, one: UserId, other: UserId, kind: RelationshipKind) -> bool:
    """Whether `end` would end anything."""
    return bool(await db.fetchval(MAY_END, one, other, kind))


async def end(db: Db, one: UserId, other: UserId, kind: RelationshipKind) -> None:
    """End a user's relationship of a kind to another one. A friendship ends on both sides. Requires the lock."""
    await db.execute(END, one, other, kind)


BETWEEN = "SELECT relationship_json(r, $1) FROM user_relationship r WHERE r.from_user_id = $1 AND r.to_user_id = $2"


async def between(db: Db, user_id: UserId, other: UserId) -> list[Relationship]:
    """Return a user's relationships of all kinds to another one."""
    return _relationship_decoder.few(row[0] for row in await db.fetch(BETWEEN, user_id, other))


SWITCH = """
WITH touched AS (UPDATE "user" SET version = version + 1 WHERE id = $1 RETURNING version),
noticed AS (UPDATE "user" SET hidden_version = hidden_version + 1 WHERE id = $2)
UPDATE user_relationship r SET from_version = t.version, updated_at = now(),
    can_see_online_status = coalesce(($3::jsonb ->> 'can_see_online_status')::boolean, can_see_online_status),
    can_send_messages = coalesce(($3 ->> 'can_send_messages')::boolean, can_send_messages),
    can_see_profile = coalesce(($3 ->> 'can_see_profile')::boolean, can_see_profile),
    notifications_enabled = coalesce(($3 ->> 'notifications_enabled')::boolean, notifications_enabled)
FROM touched t WHERE r.from_user_id = $1 AND r.to_user_id = $2
RETURNING relationship_json(r, $1)
"""


async def switch(db: Db, user_id: UserId, other: UserId, switches: dict[str, bool]) -> Relationship:
    """Set the switches of all of a user's relationships to another one. Return one of these. Requires the lock."""
    return _relationship_decoder.decode(
        await db.fetchval(SWITCH, user_id, other, msgspec.json.encode(switches).decode())
    )


# The number of interactions is that of their direct conversation, so nothing is counted twice. The sender of a friend
# request shows their face, even if private.
PAGE = f"""
SELECT json_build_object('relationship', relationship_json(r.r, $1), 'user',
    CASE WHEN may('see_face', $1, u.id) OR ((r.r).to_user_id = $1 AND (r.r).type = 'friend'
        AND (r.r).status = 'pending' AND u.is_active AND NOT u.is_deleted) THEN {FACE} END,
    'interaction_count', coalesce(c.message_count, 0), 'last_interaction_at', c.last_message_at
), (r.r).id
FROM (
    SELECT r FROM (
        SELECT r FROM user_relationship r WHERE r.from_user_id = $1 AND coalesce($3, true)
        UNION ALL
        SELECT r FROM user_relationship r
        WHERE r.to_user_id = $1 AND r.type IN ('friend', 'follow') AND NOT coalesce($3, false)
    ) r
    WHERE ($2::text IS NULL OR (r).type = $2) AND (r).status = coalesce($4, (r).status)
        AND ($4::text IS NOT NULL OR (r).status <> 'inactive') AND ($5::uuid IS NULL OR (r).id > $5)
    ORDER BY (r).id LIMIT $6
) r
JOIN "user" u ON u.id = CASE WHEN (r.r).from_user_id = $1 THEN (r.r).to_user_id ELSE (r.r).from_user_id END
LEFT JOIN conversation c ON c.direct_low = least(u.id, $1) AND c.direct_high = greatest(u.id, $1)
ORDER BY (r.r).id
"""  # noqa: S608 - FACE is a constant


async def page(db: Db, user_id: UserId, frame: ListRelationships, *, limit: int) -> Undecoded[Page[RelationshipEntry]]:
    """Return up to `limit` relationships of a user, in the order of their ids."""
    rows = await db.fetch(PAGE, user_id, frame.kind, frame.is_outgoing, frame.status, frame.after, limit + 1)
    return _entry_decoder.page(rows, limit)


# Rows that have an effect stay, such as a rejected request or switches. The other user is never notified of the end of
# a block or mute. The second IS TRUE keeps the planner from finding the rows by their age again.
FORGET = """
WITH due AS MATERIALIZED (
    SELECT r.id, r.from_user_id, r.to_user_id FROM user_relationship r
    WHERE r.status = 'inactive' AND r.updated_at < now() - $1::interval AND r.can_see_online_status
        AND r.can_send_messages AND r.can_see_profile AND r.notifications_enabled
    ORDER BY r.updated_at LIMIT $2
), held AS MATERIALIZED (
    SELECT u.id FROM "user" u WHERE u.id IN (SELECT from_user_id FROM due UNION SELECT to_user_id FROM due)
    ORDER BY u.id FOR NO KEY UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM user_relationship r USING due, held one, held other
    WHERE r.id = due.id AND one.id = due.from_user_id AND other.id = due.to_user_id
        AND (r.status = 'inactive' AND r.updated_at < now() - $1::interval AND r.can_see_online_status
            AND r.can_send_messages AND r.can_see_profile AND r.notifications_enabled) IS TRUE
    RETURNING r.from_user_id, r.from_version, r.type, r.to_user_id, r.to_version
), moved AS (
    UPDATE "user" u SET forgotten_version = greatest(u.forgotten_version, g.version)
    FROM (
        SELECT told.id, max(told.version) AS version FROM (
            SELECT from_user_id AS id, from_version AS version FROM gone
            UNION ALL SELECT to_user_id, to_version FROM gone WHERE type IN ('friend', 'follow')
        ) told GROUP BY 1
    ) g WHERE u.id = g.id
)
SELECT count(*) FROM gone
"""


async def forget(db: Db) -> bool:
    """Delete relationships that ended long ago and whose switches have their defaults, at most `MAX_DELETED`. Return
    whether there may be more.
    """
    return int(await db.fetchval(FORGET, KEPT, MAX_DELETED)) == MAX_DELETED
