"""Users: faces, profiles, presence, user versions, and locks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from protocol.client import SetPresence
from protocol.ids import UserId
from protocol.server import OwnEvent, OwnStartOverReason
from protocol.values import Me, PresenceStatus, Profile, User
from server.db.database import Db
from server.db.rows import Reader, Undecoded

_users_decoder = Reader(User)
_profile_decoder = Reader(Profile)
_me_decoder = Reader(Me)
_own_decoder = Reader(OwnEvent)

AT_ONCE = 1_000
"""Max custom statuses that one statement deletes."""

FACE = "json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image)"
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
    version = u.version + 1, own_version = u.version + 1, own_moves = u.own_moves + 1, updated_at = now()
WHERE u.id = $1 AND u.is_active
RETURNING me_json(u)
"""


async def update(db: Db, user_id: UserId, changes: dict[str, Any]) -> Me | None:
    """Change the fields in `changes` of a user, and return the user. Return None if the user is not active."""
    text = await db.fetchval(UPDATE, user_id, msgspec.json.encode(changes).decode())
    return None if text is None else _me_decoder.decode(text)


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


# Changes of the user's own rows after the user version $2, as events, the first $3 of them. Each kind uses its own
# index.
NEWS = """
SELECT u.version, u.forgotten_version, news.version, news.event FROM "user" u LEFT JOIN LATERAL (
    SELECT u.own_version AS version, json_build_object('type', 'me_changed', 'user_version', u.own_version,
        'me', me_json(u)) AS event
    WHERE u.own_version > $2
    UNION ALL
    (SELECT r.from_version, json_build_object('type', 'relationship_changed', 'user_version', r.from_version,
        'relationship', relationship_json(r, u.id))
    FROM user_relationship r WHERE r.from_user_id = u.id AND r.from_version > $2 AND r.from_version > 0
    ORDER BY r.from_version LIMIT $3)
    UNION ALL
    (SELECT r.to_version, json_build_object('type', 'relationship_changed', 'user_version', r.to_version,
        'relationship', relationship_json(r, u.id))
    FROM user_relationship r WHERE r.to_user_id = u.id AND r.to_version > $2 AND r.to_version > 0
        AND r.type IN ('friend', 'follow')
    ORDER BY r.to_version LIMIT $3)
    UNION ALL
    (SELECT p.user_version, CASE
        WHEN p.status = 'invited' AND c.is_active AND NOT c.is_deleted THEN json_build_object('type', 'invited',
            'user_version', p.user_version, 'invitation', invitation_json(p, c))
        WHEN p.status = 'active' THEN json_build_object('type', 'preferences_changed',
            'user_version', p.user_version, 'conversation_id', c.id, 'preferences', preferences_json(p))
        ELSE json_build_object('type', 'invitation_ended', 'user_version', p.user_version, 'conversation_id', c.id)
        END
    FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
    WHERE p.user_id = u.id AND p.user_version > $2 AND p.user_version > 0
    ORDER BY p.user_version LIMIT $3)
    UNION ALL
    (SELECT s.user_version, json_build_object('type', 'star_changed', 'user_version', s.user_version,
        'star', json_build_object('conversation_id', s.conversation_id, 'message_id', s.message_id,
            'is_removed', s.is_removed, 'starred_at', s.starred_at))
    FROM message_star s WHERE s.user_id = u.id AND s.user_version > $2
    ORDER BY s.user_version LIMIT $3)
    UNION ALL
    (SELECT d.user_version, json_build_object('type', 'draft_changed', 'user_version', d.user_version,
        'draft', json_build_object('conversation_id', d.conversation_id, 'content', CASE WHEN EXISTS (
            SELECT FROM conversation c WHERE c.id = d.conversation_id AND c.is_deleted OFFSET 0
        ) THEN '' ELSE d.content END, 'updated_at', d.updated_at))
    FROM draft d WHERE d.user_id = u.id AND d.user_version > $2 AND d.user_version > 0
    ORDER BY d.user_version LIMIT $3)
    UNION ALL
    (SELECT s.user_version, json_build_object('type', 'scheduled_changed', 'user_version', s.user_version,
        'scheduled', scheduled_json(s))
    FROM scheduled_message s WHERE s.sender_id = u.id AND s.user_version > $2 AND s.user_version > 0
    ORDER BY s.user_version LIMIT $3)
    UNION ALL
    (SELECT t.user_version, json_build_object('type', 'thread_follow_changed', 'user_version', t.user_version,
        'follow', thread_json(t))
    FROM thread_follow t WHERE t.user_id = u.id AND t.user_version > $2 AND t.user_version > 0
    ORDER BY t.user_version LIMIT $3)
    ORDER BY 1 LIMIT $3
) news ON true
WHERE u.id = $1
"""


OWN_PAGE = 500
"""Approximate max changes of own rows that one statement reads."""


class OwnNews(NamedTuple):
    """Changes of a user's own rows up to a user version, and whether these are all. `lost` is the reason if events
    cannot name all deleted rows.
    """

    version: int
    events: list[OwnEvent]
    is_whole: bool
    lost: OwnStartOverReason | None = None


async def news(db: Db, user_id: UserId, since: int, *, limit: int) -> Undecoded[OwnNews]:
    """Return about `limit` changes after a user version, cut where a version ends. After a version that does not exist
    yet, there are none.
    """
    rows = await db.fetch(NEWS, user_id, since, limit + 1)
    found = [row for row in rows if row[2] is not None]
    version, forgotten = rows[0][:2] if rows else (since, 0)
    is_whole = len(found) <= limit
    lost: OwnStartOverReason | None = "forgotten" if since < forgotten else None
    if since > version:
        version, found, is_whole, lost = 0, [], False, "ahead_of_server"
    elif not is_whole:
        # The last version may have more events than were read.
        version = found[-1][2] - 1
        if version <= since:
            return await news(db, user_id, since, limit=2 * limit)
        found = [row for row in found if row[2] <= version]
    return _own_decoder.each(row[3] for row in found).then(lambda events: OwnNews(version, events, is_whole, lost))


class Clocks(NamedTuple):
    """The user version, the hidden version, and the moves of the user version that concern more than own rows."""

    version: int
    hidden_version: int
    shared_moves: int


class Visibility(NamedTuple):
    """A user's choice of presence."""

    status: PresenceStatus
    custom_status: str | None
    is_shown: bool
    last_seen_at: float | None
    visible_since: float | None
    """When the user stopped being invisible. Nobody is told of a device's departure before that."""


STATUS_NOW = "CASE WHEN u.custom_status_until > now() OR u.custom_status_until IS NULL THEN u.custom_status END"
"""A custom status until it expires, for queries with the user's row as `u`."""


class Watchable(NamedTuple):
    """The presence of a user whose face a watcher may see."""

    is_seen: bool
    """Whether the user's presence may be delivered to the watcher."""
    choice: Visibility


WATCHABLE = f"""
SELECT pair.watcher, u.id, u.show_online_status, u.status, {STATUS_NOW}, may('see_presence', pair.watcher, u.id),
    extract(epoch FROM u.last_seen_at)::float8, extract(epoch FROM u.visible_since)::float8
FROM unnest($1::uuid[], $2::uuid[]) AS pair (watcher, watched) JOIN "user" u ON u.id = pair.watched
WHERE u.is_active AND NOT u.is_deleted AND may('see_face', pair.watcher, u.id)
"""  # noqa: S608 - STATUS_NOW is a constant


async def watchable(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> dict[tuple[UserId, UserId], Watchable]:
    """Return the pairs of a watcher and a watched user whose watcher may see the face."""
    rows = await db.fetch(WATCHABLE, [one for one, _ in pairs], [other for _, other in pairs])
    found: dict[tuple[UserId, UserId], Watchable] = {}
    for watcher, watched, is_shown, *choice in rows:
        visibility = Visibility(*choice)
        # The presence of a user who hides it from everybody is delivered as `offline`.
        found[watcher, watched] = Watchable(visibility.is_shown or not is_shown, visibility)
    return found


# 'away' belongs to a device, not to the user. 'offline' is the column's value for users who never chose. A user who
# becomes invisible is last seen then, as if they had disconnected. A user who is visible again is visible from the time
# at which the row was locked.
CHOOSE = """
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
    OR u.custom_status_until IS NOT NULL OR $5::float8 IS NOT NULL)))
RETURNING (u.visible_since >= now()) IS TRUE
"""


class Choice(NamedTuple):
    """Whether the choice changed the row, and whether it ended invisibility."""

    is_new: bool
    is_visible_again: bool


async def choose(db: Db, user_id: UserId, frame: SetPresence, *, is_here: bool) -> Choice:
    """Store the chosen presence of a user. `is_here` tells whether the user is online."""
    custom_status = None if frame.custom_status is UNSET else frame.custom_status
    seconds = frame.custom_status_seconds
    is_visible_again = await db.fetchval(
        CHOOSE, user_id, frame.status, frame.custom_status is not UNSET, custom_status, seconds, is_here
    )
    return Choice(is_visible_again is not None, bool(is_visible_again))


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
    """Delete expired custom statuses, at most `AT_ONCE`. Return their users."""
    return [UserId(row[0]) for row in await db.fetch(EXPIRE, AT_ONCE)]


CHOICES = f"""
SELECT u.id, u.status, {STATUS_NOW}, u.show_online_status, extract(epoch FROM u.last_seen_at)::float8,
    extract(epoch FROM u.visible_since)::float8
FROM "user" u WHERE u.id = ANY($1)
"""  # noqa: S608 - STATUS_NOW is a constant


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
        FROM unnest($1::uuid[], $2::boolean[], $3::integer[], $4::float8[]) AS s (id, is_online, last_close, left_at)
        JOIN "user" o ON o.id = s.id AND o.erased_at IS NULL ORDER BY o.id FOR NO KEY UPDATE OF o SKIP LOCKED
    ) s
    WHERE u.id = s.id RETURNING u.id
)
SELECT id FROM noted UNION ALL SELECT s.id FROM unnest($1) AS s (id)
WHERE NOT EXISTS (SELECT FROM "user" o WHERE o.id = s.id AND o.erased_at IS NULL)
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
