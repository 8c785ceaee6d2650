"""Presence: the users' choices, when they were last seen, and who may see it."""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET

from protocol.client import SetPresence
from protocol.ids import UserId
from protocol.server import MeChanged
from protocol.values import PresenceStatus, User
from server.db.database import Db
from server.db.lock_timeouts import BRIEFLY
from server.queries.users import decoded_me

MAX_DELETED = 1_000
"""Max custom statuses that one statement deletes."""


class Visibility(NamedTuple):
    """A user's choice of presence."""

    status: PresenceStatus
    custom_status: str | None
    is_shown: bool
    last_seen_at: float | None
    visible_since: float | None
    """When the user stopped being invisible. Nobody is told of a device's departure before that."""
    revision: int
    """The start of the statement that read this, in microseconds of the epoch. The clock of PostgreSQL is one for all
    workers. Each change is announced by a statement that begins after it, so the highest revision has the final state.
    """


# `now()` precedes the snapshot of a statement outside a transaction, unlike `statement_timestamp()`.
REVISION = "(extract(epoch FROM now()) * 1000000)::bigint"
STATUS_NOW = "CASE WHEN u.custom_status_until > now() OR u.custom_status_until IS NULL THEN u.custom_status END"
"""A custom status until it expires, for queries with the user's row as `u`."""


class Sightings(NamedTuple):
    """The pairs whose watcher may see the face, and the revision of this result, which also holds for the others."""

    pairs: dict[tuple[UserId, UserId], "Watchable"]
    revision: int


class Watchable(NamedTuple):
    """The presence of a user whose face a watcher may see."""

    is_seen: bool
    """Whether the user's presence may be delivered to the watcher."""
    choice: Visibility
    face: User


WATCHABLE = f"""
SELECT {REVISION}, found.* FROM (SELECT) one LEFT JOIN (
    SELECT pair.watcher, u.id, u.name, u.display_name, u.image, u.face_version, u.show_online_status, u.status,
        {STATUS_NOW}, may('see_presence', pair.watcher, u.id),
        extract(epoch FROM u.last_seen_at)::float8, extract(epoch FROM u.visible_since)::float8
    FROM unnest($1::uuid[], $2::uuid[]) AS pair (watcher, watched) JOIN "user" u ON u.id = pair.watched
    WHERE u.is_active AND NOT u.is_deleted AND may('see_face', pair.watcher, u.id)
) found ON true
"""  # noqa: S608 - constants are put in


async def watchable(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
    """Return the pairs of a watcher and a watched user whose watcher may see the face."""
    rows = await db.fetch(WATCHABLE, [one for one, _ in pairs], [other for _, other in pairs])
    found = Sightings({}, rows[0][0])
    for revision, watcher, watched, name, display_name, image, face_version, is_shown, *choice in rows:
        if watcher is not None:
            visibility = Visibility(*[*choice, revision])
            face = User(id=watched, name=name, display_name=display_name, image=image, revision=face_version)
            # The presence of a user who hides it from everybody is delivered as `offline`.
            found.pairs[watcher, watched] = Watchable(visibility.is_shown or not is_shown, visibility, face)
    return found


# 'away' belongs to a device, not to the user. 'offline' is the column's value for users who never chose. A user who
# becomes invisible is last seen then, as if they had disconnected. A user who is visible again is visible from the time
# at which the row was locked.
CHOOSE = f"""
UPDATE "user" u SET updated_at = now(), status = chosen.status,
    last_seen_at = CASE WHEN ($6 OR u.is_online) AND chosen.status = 'invisible' AND u.status <> 'invisible' THEN now()
        ELSE u.last_seen_at END,
    visible_since = CASE WHEN u.status = 'invisible' AND chosen.status <> 'invisible' THEN clock_timestamp()
        ELSE u.visible_since END,
    custom_status = CASE WHEN $3 THEN $4 ELSE u.custom_status END,
    custom_status_until = CASE WHEN $3 THEN now() + make_interval(secs => $5) ELSE u.custom_status_until END,
    version = u.version + 1, own_version = u.version + 1, own_moves = u.own_moves + 1
FROM (
    SELECT CASE $2 WHEN 'away' THEN status WHEN 'offline' THEN 'invisible' ELSE $2 END AS status
    FROM "user" WHERE id = $1
) chosen
WHERE u.id = $1 AND u.is_active AND (u.status <> chosen.status OR ($3 AND (u.custom_status IS DISTINCT FROM $4
    OR u.custom_status_until IS NOT NULL OR $5::float8 IS NOT NULL))) AND {BRIEFLY}
RETURNING (u.visible_since >= now()) IS TRUE, u.version, me_json(u)
"""  # noqa: S608 - a constant is put in


class Choice(NamedTuple):
    """The event, if the choice changed the row, and whether it ended invisibility."""

    event: MeChanged | None
    is_visible_again: bool


async def choose(db: Db, user_id: UserId, frame: SetPresence, *, is_here: bool) -> Choice:
    """Store the chosen presence of a user. `is_here` tells whether the user is online."""
    custom_status = None if frame.custom_status is UNSET else frame.custom_status
    seconds = frame.custom_status_seconds
    row = await db.fetchrow(
        CHOOSE, user_id, frame.status, frame.custom_status is not UNSET, custom_status, seconds, is_here
    )
    return Choice(None, is_visible_again=False) if row is None else Choice(decoded_me(row[1], row[2]), row[0])


EXPIRE = """
WITH t AS MATERIALIZED (
    SELECT id FROM "user" WHERE custom_status_until <= now()
    ORDER BY custom_status_until LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE "user" u SET custom_status = NULL, custom_status_until = NULL,
    version = u.version + 1, own_version = u.version + 1, own_moves = u.own_moves + 1
FROM t
WHERE u.id = t.id RETURNING u.id
"""


async def expire_statuses(db: Db) -> list[UserId]:
    """Delete expired custom statuses, at most `MAX_DELETED`. Return their users."""
    return [UserId(row[0]) for row in await db.fetch(EXPIRE, MAX_DELETED)]


CHOICES = f"""
SELECT u.id, u.status, {STATUS_NOW}, u.show_online_status, extract(epoch FROM u.last_seen_at)::float8,
    extract(epoch FROM u.visible_since)::float8, {REVISION}
FROM "user" u WHERE u.id = ANY($1)
"""  # noqa: S608 - constants are put in


async def choices(db: Db, user_ids: Sequence[UserId]) -> dict[UserId, Visibility]:
    """Return the users' choices of presence, to announce them."""
    return {row[0]: Visibility(*row[1:]) for row in await db.fetch(CHOICES, list(user_ids))}


# Arrivals and departures of an invisible user are not recorded, so they do not appear later either. Locked rows are
# skipped, so that they do not delay others.
SEEN = """
WITH noted AS (
    UPDATE "user" u SET is_online = s.is_online, last_close = s.last_close,
        last_seen_at = CASE WHEN u.status = 'invisible' OR s.at < u.visible_since THEN u.last_seen_at
            ELSE greatest(u.last_seen_at, s.at) END
    FROM (
        SELECT s.id, s.is_online, s.last_close, least(to_timestamp(s.left_at), now()) AS at
        FROM (
            SELECT * FROM unnest($1::uuid[], $2::boolean[], $3::integer[], $4::float8[])
                AS s (id, is_online, last_close, left_at) ORDER BY s.id
        ) s CROSS JOIN LATERAL (
            SELECT FROM "user" o WHERE o.id = s.id AND o.erased_at IS NULL FOR NO KEY UPDATE SKIP LOCKED
        ) free
    ) s
    WHERE u.id = s.id RETURNING u.id
)
SELECT id FROM noted UNION ALL SELECT s.id FROM unnest($1) AS s (id)
WHERE NOT EXISTS (SELECT FROM "user" o WHERE o.id = s.id AND o.erased_at IS NULL OFFSET 0)
"""


class Transition(NamedTuple):
    """A user came online or went offline. `close_code` is the server's close code of the last connection, if it closed
    that. `left_at` is the time in seconds of the epoch, if it is not now.
    """

    is_online: bool
    close_code: int | None = None
    left_at: float | None = None


async def seen(db: Db, transitions: dict[UserId, Transition]) -> dict[UserId, Transition]:
    """Record arrivals and departures. Return those of users whose rows other transactions have locked."""
    came = [one.is_online for one in transitions.values()]
    codes = [one.close_code for one in transitions.values()]
    left_at = [one.left_at for one in transitions.values()]
    rows = await db.fetch(SEEN, list(transitions), came, codes, left_at)
    done = {row[0] for row in rows}
    return {user_id: one for user_id, one in transitions.items() if user_id not in done}


UNSEEN = """(SELECT ARRAY(
    SELECT r.from_user_id FROM user_relationship r
    WHERE r.to_user_id = $2 AND (NOT r.can_see_online_status OR (r.type = 'block' AND r.status = 'active'))
    UNION ALL
    SELECT r.to_user_id FROM user_relationship r
    WHERE r.from_user_id = $2 AND r.type = 'block' AND r.status = 'active'
))::uuid[]"""
"""Users whose presence the user $2 may not see, evaluated once and not for each row."""
