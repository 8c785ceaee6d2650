"""Users as others see them."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from protocol.client import SetPresence
from protocol.ids import UserId
from protocol.values import PresenceStatus, User
from server.database import Db

_users_decoder = msgspec.json.Decoder(list[User])

FACE = """json_build_object(
    'id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image, 'bio', u.bio)"""
"""A user's public face (protocol/values.py), for queries that have the user's row as `u`."""

MAY_SEE = """u.id = ANY($2) AND u.is_active AND NOT u.is_deleted AND (
    NOT u.is_private OR u.id = $1 OR EXISTS (
        SELECT FROM conversation_participant mine
        JOIN conversation_participant theirs
            ON theirs.conversation_id = mine.conversation_id AND theirs.user_id = u.id AND theirs.status = 'active'
        WHERE mine.user_id = $1 AND mine.status = 'active'
    )
)"""
"""Those of the users $2 whom $1 may see: someone private only by those who share a conversation with them."""

GET = f"""
SELECT coalesce(json_agg({FACE}), '[]')
FROM "user" u
WHERE {MAY_SEE}
"""  # noqa: S608 - FACE and MAY_SEE are constants


async def get(db: Db, caller: UserId, user_ids: Sequence[UserId]) -> list[User]:
    """Return those of the users that exist and that the caller may see."""
    return _users_decoder.decode(await db.fetchval(GET, caller, list(user_ids)))


class Visibility(NamedTuple):
    """What a user has chosen about being seen."""

    status: PresenceStatus
    custom_status: str | None
    is_shown: bool
    last_seen_at: float | None


# A watcher may see the presence of whom they may see at all, unless that user or a relationship says otherwise.
VISIBLE = f"""
SELECT u.id, u.status, u.custom_status, u.show_online_status AND NOT EXISTS (
        SELECT FROM user_relationship r
        WHERE r.from_user_id = u.id AND r.to_user_id = $1
            AND (NOT r.can_see_online_status OR (r.type = 'block' AND r.status = 'active'))
    ), extract(epoch FROM u.last_seen_at)::float8
FROM "user" u
WHERE {MAY_SEE}
"""  # noqa: S608 - MAY_SEE is a constant


async def visible(db: Db, caller: UserId, user_ids: Sequence[UserId]) -> dict[UserId, Visibility]:
    """Return the choices of those of the users that the caller may know of. `last_seen_at` is in Unix seconds."""
    return {row[0]: Visibility(*row[1:]) for row in await db.fetch(VISIBLE, caller, list(user_ids))}


# 'away' belongs to a device, not to the user; 'offline' is what the column says of those who never chose.
CHOOSE = """
UPDATE "user" SET updated_at = now(),
    status = CASE $2 WHEN 'away' THEN status WHEN 'offline' THEN 'invisible' ELSE $2 END,
    custom_status = CASE WHEN $3 THEN $4 ELSE custom_status END
WHERE id = $1
"""


async def choose(db: Db, user_id: UserId, frame: SetPresence) -> None:
    """Record how a user wants to be seen."""
    custom_status = None if frame.custom_status is UNSET else frame.custom_status
    await db.execute(CHOOSE, user_id, frame.status, frame.custom_status is not UNSET, custom_status)


CHOICES = """SELECT id, status, custom_status, show_online_status FROM "user" WHERE id = ANY($1)"""


async def choices(db: Db, user_ids: Sequence[UserId]) -> dict[UserId, Visibility]:
    """Return how users want to be seen, to announce it."""
    return {row[0]: Visibility(row[1], row[2], row[3], None) for row in await db.fetch(CHOICES, list(user_ids))}


SEEN = """
UPDATE "user" u SET is_online = s.is_online, last_seen_at = greatest(u.last_seen_at, now())
FROM (SELECT * FROM unnest($1::uuid[], $2::boolean[]) AS s (id, is_online) ORDER BY s.id) s WHERE u.id = s.id
"""


async def seen(db: Db, transitions: dict[UserId, bool]) -> None:
    """Record that users came online (True) or went offline (False) just now."""
    await db.execute(SEEN, list(transitions), list(transitions.values()))


VERSIONS = """SELECT id, version FROM "user" WHERE id = ANY($1)"""


async def versions(db: Db, user_ids: Sequence[UserId]) -> dict[UserId, int]:
    """Return the users' own clocks."""
    return {row[0]: row[1] for row in await db.fetch(VERSIONS, list(user_ids))}


TOUCH = """
UPDATE "user" u SET version = u.version + 1
FROM (SELECT id FROM "user" WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE) t WHERE u.id = t.id
"""


async def touch(db: Db, user_ids: Sequence[UserId]) -> None:
    """Move the users' own clocks: their conversations or sessions changed. Always after a conversation's lock."""
    await db.execute(TOUCH, list(user_ids))


ARE_THERE = """SELECT count(*) FROM "user" u WHERE u.id = ANY($1) AND u.is_active AND NOT u.is_deleted"""


async def are_there(db: Db, user_ids: Sequence[UserId]) -> bool:
    """Whether all of the users exist and are active."""
    return bool(await db.fetchval(ARE_THERE, list(user_ids)) == len(set(user_ids)))


MAY_WRITE = """
SELECT EXISTS (SELECT FROM "user" u WHERE u.id = $2 AND u.is_active AND NOT u.is_deleted) AND NOT EXISTS (
    SELECT FROM user_relationship r
    WHERE r.from_user_id = $2 AND r.to_user_id = $1
        AND (NOT r.can_send_messages OR (r.type = 'block' AND r.status = 'active'))
)
"""


async def may_write(db: Db, user_id: UserId, other: UserId) -> bool:
    """Whether a user may open a direct conversation with the other one, who is there and does not refuse it."""
    return bool(await db.fetchval(MAY_WRITE, user_id, other))
