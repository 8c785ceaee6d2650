"""Sessions: found by the hash of their token, extended while they are used, deleted when revoked."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from protocol.ids import SessionId, UserId
from protocol.limits import MAX_SESSIONS
from protocol.values import Session, User
from server.db.database import Db
from server.db.rows import Reader, Undecoded
from server.queries.users import FACE

_user_decoder = Reader(User)
_sessions_decoder = Reader(Session)

MAX_DELETED = 1_000
"""Max sessions that one statement deletes."""

# `updated_at` is the time at which a session began or was last extended, which happens at least daily while it is used.
CREATE = f"""
WITH welcome AS (
    SELECT u.id FROM "user" u
    WHERE u.id = $1 AND u.is_active AND NOT u.is_deleted AND NOT u.is_disabled AND u.erased_at IS NULL
        AND ($6::text IS NULL OR EXISTS (
            SELECT FROM account a WHERE a.user_id = u.id AND a.provider_id = 'credential' AND a.password = $6
        ))
), unused AS (
    SELECT s.id FROM welcome JOIN session s ON s.user_id = welcome.id
    ORDER BY s.updated_at DESC, s.id DESC OFFSET {MAX_SESSIONS - 1}
), touched AS (
    UPDATE "user" SET version = version + 1 WHERE id = $1 AND EXISTS (SELECT FROM unused) RETURNING id
), ended AS (
    DELETE FROM session s USING unused, touched WHERE s.id = unused.id
)
INSERT INTO session (user_id, token, expires_at, ip_address, user_agent)
SELECT welcome.id, $2, now() + $3, $4, $5 FROM welcome
RETURNING id, expires_at, EXISTS (SELECT FROM unused)
"""  # noqa: S608 - a number is put in


class Beginning(NamedTuple):
    """A session that has begun, and whether others ended because of it."""

    session_id: SessionId
    expires_at: datetime
    has_ended_others: bool


async def create(
    db: Db,
    user_id: UserId,
    token_hash: str,
    lasts: timedelta,
    device: tuple[str | None, str | None],
    *,
    password_hash: str | None = None,
) -> Beginning | None:
    """Begin a session. `device` is its address and its user agent. Beyond `MAX_SESSIONS`, the one that was unused for
    longest ends.

    Return None if the user is not active, or if `password_hash` of the check is no longer the user's. Requires the
    user's lock, which all changes of either take.
    """
    row = await db.fetchrow(CREATE, user_id, token_hash, lasts, *device, password_hash)
    return None if row is None else Beginning(*row)


class Active(NamedTuple):
    """A valid session, its user, and the user version at that time."""

    session_id: SessionId
    expires_at: datetime
    user_version: int
    user: User


# A restored session may expire in any year, and Python supports years up to 9999. IS TRUE keeps the planner from
# reading all sessions by session_expires_idx.
FIND = f"""
SELECT s.token, s.id, least(s.expires_at, '9999-12-30'), u.version, {FACE}
FROM session s JOIN "user" u ON u.id = s.user_id AND u.is_active AND NOT u.is_deleted
WHERE s.token = ANY($1) AND (s.expires_at > now()) IS TRUE
"""  # noqa: S608 - FACE is a constant


async def find(db: Db, token_hashes: Sequence[str]) -> Undecoded[dict[str, Active]]:
    """Return the valid ones of these sessions, by the hash of the token."""
    rows = await db.fetch(FIND, list(token_hashes))
    found = _user_decoder.beside([(row[4], *row[:4]) for row in rows])
    return found.then(lambda read: {row[1]: Active(row[2], row[3], row[4], user) for user, row in read})


FIND_BY_ID = f"""
SELECT s.id, least(s.expires_at, '9999-12-30'), u.version, {FACE}
FROM session s JOIN "user" u ON u.id = s.user_id AND u.is_active AND NOT u.is_deleted
WHERE s.id = ANY($1) AND (s.expires_at > now()) IS TRUE
"""  # noqa: S608 - FACE is a constant


async def find_by_id(db: Db, session_ids: Sequence[SessionId]) -> Undecoded[dict[SessionId, Active]]:
    """Return the valid ones of these sessions."""
    rows = await db.fetch(FIND_BY_ID, list(session_ids))
    found = _user_decoder.beside([(row[3], *row[:3]) for row in rows])
    return found.then(lambda read: {row[1]: Active(row[1], row[2], row[3], user) for user, row in read})


# A session that another transaction has locked is being revoked or extended. It is skipped.
SLIDE = """
WITH extended AS (
    UPDATE session s SET expires_at = now() + $2, updated_at = now()
    FROM (
        SELECT id FROM session WHERE id = ANY($1) AND (expires_at > now()) IS TRUE
        ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
    ) t
    WHERE s.id = t.id AND s.id = ANY($1)
    RETURNING s.id, s.expires_at
)
SELECT e.id, e.expires_at FROM extended e
UNION ALL
SELECT s.id, least(s.expires_at, '9999-12-30') FROM session s
WHERE s.id = ANY($1) AND (s.expires_at > now()) IS TRUE AND s.id <> ALL (ARRAY(SELECT e.id FROM extended e))
"""


async def slide(db: Db, session_ids: Sequence[SessionId], lasts: timedelta) -> dict[SessionId, datetime]:
    """Extend sessions. Return when each valid one expires."""
    return {row[0]: row[1] for row in await db.fetch(SLIDE, list(session_ids), lasts)}


LIVING = """
SELECT s.id, least(s.expires_at, '9999-12-30')
FROM session s JOIN "user" u ON u.id = s.user_id AND u.is_active AND NOT u.is_deleted
WHERE s.id = ANY($1) AND (s.expires_at > now()) IS TRUE
"""


async def living(db: Db, session_ids: Sequence[SessionId]) -> dict[SessionId, datetime]:
    """Return the valid ones of these sessions, with the times at which they expire."""
    return {row[0]: row[1] for row in await db.fetch(LIVING, list(session_ids))}


LIST = """
SELECT coalesce(json_agg(s ORDER BY s.created_at DESC), '[]') FROM (
    SELECT id, created_at, expires_at, ip_address, user_agent, coalesce(id = $2, false) AS is_current
    FROM session WHERE user_id = $1 AND expires_at > now() ORDER BY created_at DESC LIMIT 100
) s
"""


async def of_user(db: Db, user_id: UserId, current: SessionId | None) -> list[Session]:
    """Return up to 100 valid sessions of a user, newest first."""
    return _sessions_decoder.every(await db.fetchval(LIST, user_id, current))


IS_THERE = "SELECT EXISTS (SELECT FROM session WHERE user_id = $1 AND ($2::uuid IS NULL OR id = $2))"


async def is_there(db: Db, user_id: UserId, session_id: SessionId | None) -> bool:
    """Whether `revoke` with the same arguments would end a session."""
    return bool(await db.fetchval(IS_THERE, user_id, session_id))


REVOKE = "DELETE FROM session WHERE user_id = $1 AND ($2::uuid IS NULL OR id = $2) RETURNING id"


async def revoke(db: Db, user_id: UserId, session_id: SessionId | None) -> int:
    """End one session of a user, or all. Return their number. Requires the user's lock."""
    return len(await db.fetch(REVOKE, user_id, session_id))


EXPIRED = """
WITH due AS MATERIALIZED (
    SELECT o.id FROM session o WHERE o.expires_at < now() - interval '1 day' LIMIT $1 FOR UPDATE SKIP LOCKED
)
DELETE FROM session s USING due WHERE s.id = due.id RETURNING true
"""


async def clear_expired(db: Db) -> bool:
    """Delete sessions that expired more than a day ago, at most `MAX_DELETED`. Return whether there may be more."""
    return len(await db.fetch(EXPIRED, MAX_DELETED)) == MAX_DELETED
