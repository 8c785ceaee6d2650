"""Users: faces, profiles, user versions, and locks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.ids import UserId
from protocol.server import MeChanged
from protocol.values import Me, Profile, User
from server.db.database import Db
from server.db.rows import Reader

_users_decoder = Reader(User)
_profile_decoder = Reader(Profile)
_me_decoder = Reader(Me)

FACE = """json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image,
    'revision', u.face_version)"""
"""A user's face (protocol/values.py), for queries with the user's row as `u`."""
MOVE_OWN = """UPDATE "user" SET version = version + 1, own_moves = own_moves + 1 WHERE id = $2"""
"""Locks the user `$2` and moves the user version, for queries that change only rows of that user. Further conditions
and `RETURNING version` follow.
"""

GET = f"""
SELECT coalesce(json_agg({FACE}), '[]') FROM "user" u WHERE u.id = ANY($2) AND may('see_face', $1, u.id)
"""  # noqa: S608 - FACE is a constant


async def get(db: Db, caller: UserId, user_ids: Sequence[UserId]) -> list[User]:
    """Return the existing ones of these users whom the caller may see."""
    return _users_decoder.every(await db.fetchval(GET, caller, list(user_ids)))


PROFILE = f"""
SELECT json_build_object('user', {FACE}, 'bio', u.bio, 'location', u.location, 'website', u.website,
    'created_at', u.created_at)
FROM "user" u WHERE u.id = $2 AND may('see_profile', $1, $2)
"""  # noqa: S608 - FACE is a constant


async def profile(db: Db, caller: UserId, user_id: UserId) -> Profile | None:
    """Return a user's profile. Return None if the caller may not see it."""
    text = await db.fetchval(PROFILE, caller, user_id)
    return None if text is None else _profile_decoder.decode(text)


# At most a thousand matches are checked for visibility, because a useful search has fewer. `IS TRUE` keeps the planner
# from reading the index of active users, which are nearly all, in addition to the index of words.
SEARCH = f"""
SELECT coalesce(json_agg({FACE} ORDER BY u.name, u.id), '[]') FROM (
    SELECT u.* FROM (
        SELECT * FROM "user" u
        WHERE to_tsvector('simple', unpunctuated(u.name || ' ' || coalesce(u.display_name, '')))
                @@ to_tsquery('simple', $2)
            AND (u.is_active AND NOT u.is_deleted) IS TRUE
        LIMIT 1000
    ) u
    WHERE u.id <> $1 AND may('see_face', $1, u.id)
    ORDER BY u.name, u.id LIMIT $3
) u
"""  # noqa: S608 - FACE is a constant


async def search(db: Db, caller: UserId, query: str, *, limit: int) -> list[User]:
    """Return users who match a query of `search_text.query` and whom the caller may see."""
    return _users_decoder.every(await db.fetchval(SEARCH, caller, query, limit))


ME = """SELECT me_json(u) FROM "user" u WHERE u.id = $1"""


async def me(db: Db, user_id: UserId) -> Me:
    """Return the user's own account."""
    return _me_decoder.decode(await db.fetchval(ME, user_id))


UPDATE = """
UPDATE "user" u SET
    name = coalesce($2::jsonb ->> 'name', u.name),
    display_name = CASE WHEN $2 ? 'display_name' THEN $2 ->> 'display_name' ELSE u.display_name END,
    image = CASE WHEN $2 ? 'image' THEN $2 ->> 'image' ELSE u.image END,
    bio = CASE WHEN $2 ? 'bio' THEN $2 ->> 'bio' ELSE u.bio END,
    location = CASE WHEN $2 ? 'location' THEN $2 ->> 'location' ELSE u.location END,
    website = CASE WHEN $2 ? 'website' THEN $2 ->> 'website' ELSE u.website END,
    is_private = coalesce(($2 ->> 'is_private')::boolean, u.is_private),
    allow_friend_requests = coalesce(($2 ->> 'allow_friend_requests')::boolean, u.allow_friend_requests),
    show_online_status = coalesce(($2 ->> 'show_online_status')::boolean, u.show_online_status),
    allow_adding = coalesce(($2 ->> 'allow_adding')::boolean, u.allow_adding),
    quiet_from = CASE WHEN $2 ? 'quiet_from' THEN ($2 ->> 'quiet_from')::time ELSE u.quiet_from END,
    quiet_until = CASE WHEN $2 ? 'quiet_until' THEN ($2 ->> 'quiet_until')::time ELSE u.quiet_until END,
    time_zone = coalesce($2 ->> 'time_zone', u.time_zone),
    face_version = u.face_version + (coalesce($2 ->> 'name', u.name) <> u.name
        OR ($2 ? 'display_name' AND $2 ->> 'display_name' IS DISTINCT FROM u.display_name)
        OR ($2 ? 'image' AND $2 ->> 'image' IS DISTINCT FROM u.image))::integer,
    version = u.version + 1, own_version = u.version + 1, own_moves = u.own_moves + 1, updated_at = now()
WHERE u.id = $1 AND u.is_active
RETURNING u.version, me_json(u)
"""


async def update(db: Db, user_id: UserId, changes: dict[str, Any]) -> MeChanged | None:
    """Change the fields in `changes` of a user. Return None if the user is not active."""
    row = await db.fetchrow(UPDATE, user_id, msgspec.json.encode(changes).decode())
    return None if row is None else decoded_me(*row)


def decoded_me(version: int, me: str) -> MeChanged:
    """Return the event of a user version with the result of me_json()."""
    return MeChanged(user_version=version, me=_me_decoder.decode(me))


TIME_ZONES = "SELECT name FROM pg_timezone_names"
_time_zones: set[str] = set()
"""The names of time zones in PostgreSQL. Reading them takes tens of milliseconds, so a process reads them once."""


async def is_time_zone(db: Db, name: str) -> bool:
    """Whether PostgreSQL has a time zone. Names are compared here, because PostgreSQL would log a name that it refuses,
    and accepts any text in angle brackets.
    """
    if not _time_zones:
        _time_zones.update(row[0] for row in await db.fetch(TIME_ZONES))
    return name in _time_zones


IS_ACTIVE = """SELECT u.is_active AND NOT u.is_deleted FROM "user" u WHERE u.id = $1"""


async def is_active(db: Db, user_id: UserId) -> bool:
    """Whether a user's account is active."""
    return bool(await db.fetchval(IS_ACTIVE, user_id))


IS_DELETED = """SELECT is_deleted FROM "user" WHERE id = $1"""


async def is_deleted(db: Db, user_id: UserId) -> bool:
    """Whether a user has deleted the account, or was erased, or is being erased."""
    return bool(await db.fetchval(IS_DELETED, user_id))


IS_ADMIN = """SELECT is_admin FROM "user" WHERE id = $1"""


async def is_admin(db: Db, user_id: UserId) -> bool:
    """Whether a user is a server administrator."""
    return bool(await db.fetchval(IS_ADMIN, user_id))


class Clocks(NamedTuple):
    """The user version, the hidden version, and the moves of the user version that concern more than own rows."""

    version: int
    hidden_version: int
    shared_moves: int


VERSIONS = """SELECT id, version, hidden_version, version - own_moves FROM "user" WHERE id = ANY($1)"""


async def versions(db: Db, user_ids: Sequence[UserId]) -> dict[UserId, Clocks]:
    """Return the versions of users."""
    return {row[0]: Clocks(*row[1:]) for row in await db.fetch(VERSIONS, list(user_ids))}


# The second step in the order of locks (queries/__init__.py).
LOCK = """
SELECT u.id, u.is_active AND NOT u.is_deleted FROM "user" u WHERE u.id = ANY($1) ORDER BY u.id FOR NO KEY UPDATE
"""


async def lock(db: Db, user_ids: Iterable[UserId]) -> set[UserId]:
    """Lock users until the transaction ends, so that later reads of their rows are current. Return the active ones.

    This follows a conversation's lock and precedes all rows of the users. A transaction calls it once, for all of its
    users.
    """
    return {UserId(row[0]) for row in await db.fetch(LOCK, list(user_ids)) if row[1]}


KEEP = """SELECT FROM "user" WHERE id = $1 FOR KEY SHARE"""


async def keep(db: Db, user_id: UserId) -> None:
    """Make the erasure of a user wait until the transaction ends, so that later reads of `is_deleted` are current. It
    waits for an erasure in progress, and for no other lock on the user's row.
    """
    await db.execute(KEEP, user_id)


LOCK_FREE = """
SELECT u.id FROM "user" u WHERE u.id = ANY($1) ORDER BY u.id FOR NO KEY UPDATE SKIP LOCKED
"""


async def lock_free(db: Db, user_ids: Sequence[UserId]) -> list[UserId]:
    """Lock those of the users whom no other transaction has locked, until the transaction ends. Return them."""
    return [UserId(row[0]) for row in await db.fetch(LOCK_FREE, user_ids)]


TOUCH = """
UPDATE "user" u SET version = u.version + 1
FROM (SELECT id FROM "user" WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE) t WHERE u.id = t.id
"""


async def touch(db: Db, user_ids: Sequence[UserId]) -> None:
    """Move user versions, because conversations or sessions of these users changed. Always after a
    conversation's lock.
    """
    await db.execute(TOUCH, list(user_ids))


ALL_MAY = "SELECT count(*) FROM unnest($3::uuid[]) AS named (user_id) WHERE NOT may($1, $2, user_id)"


async def all_may(db: Db, action: str, caller: UserId, user_ids: Sequence[UserId]) -> bool:
    """Whether the caller may do something (protocol/privacy.py) to all of the users. The caller is skipped."""
    others = [user_id for user_id in user_ids if user_id != caller]
    return not others or not await db.fetchval(ALL_MAY, action, caller, others)
