"""Erasing a person: what they said stays, and nothing else of them."""

import re
from collections.abc import Collection
from datetime import timedelta
from typing import NamedTuple

from protocol.ids import ConversationId, UserId
from server.database import Db
from server.queries.relationships import BLANK

AT_ONCE = 10

DUE = """
SELECT id FROM "user" WHERE is_deleted AND erased_at IS NULL AND deleted_at < now() - $1::interval AND id <> ALL ($2)
ORDER BY deleted_at LIMIT $3
"""


async def due(db: Db, grace: timedelta, besides: Collection[UserId]) -> list[UserId]:
    """Return the users, besides some whose time of grace is over, the first ones, at most `AT_ONCE`."""
    return [UserId(row[0]) for row in await db.fetch(DUE, grace, list(besides), AT_ONCE)]


# First of all the user cannot come in any more, and whatever lets somebody into a conversation refuses them: it asks
# under the user's lock whether they are active. The logins go now, so that nobody comes back who is half erased.
IS_DUE = """
SELECT is_deleted AND erased_at IS NULL AND deleted_at < now() - $2::interval FROM "user" WHERE id = $1
"""
SHUT_OUT = (
    "DELETE FROM session WHERE user_id = $1",
    "DELETE FROM account WHERE user_id = $1",
    """
    UPDATE "user" SET is_active = false, is_deleted = true, deleted_at = coalesce(deleted_at, now()),
        updated_at = now(), version = version + 1
    WHERE id = $1
    """,
)


async def shut_out(db: Db, user_id: UserId, grace: timedelta | None) -> bool:
    """Deactivate a user for good; False, and in vain, if `grace` is given and they did not delete their account, or not
    so long ago. Under the user's lock.
    """
    if grace is not None and not await db.fetchval(IS_DUE, user_id, grace):
        return False
    for STATEMENT in SHUT_OUT:  # noqa: N806 - a constant of this file, as all that is asked of the database
        await db.execute(STATEMENT, user_id)
    return True


TAKES_PART = """
SELECT p.conversation_id FROM conversation_participant p
WHERE p.user_id = $1 AND p.status IN ('active', 'invited') ORDER BY p.conversation_id
"""
# What was deleted for everyone has no events and no owner any more, and `participants.leave` does not know it.
LEAVE_DELETED = """
WITH counted AS (
    UPDATE conversation c SET participant_count = c.participant_count - (p.status = 'active')::integer
    FROM conversation_participant p
    WHERE c.id = $1 AND c.is_deleted AND p.conversation_id = $1 AND p.user_id = $2 AND p.status IN ('active', 'invited')
    RETURNING c.id
)
UPDATE conversation_participant p SET status = 'left', left_at = now() FROM counted
WHERE p.conversation_id = counted.id AND p.user_id = $2
"""


async def leave_deleted(db: Db, conversation_id: ConversationId, user_id: UserId) -> None:
    """Let a user out of a conversation that was deleted."""
    await db.execute(LEAVE_DELETED, conversation_id, user_id)


async def conversations(db: Db, user_id: UserId) -> list[ConversationId]:
    """Return where a user takes part or is invited to."""
    return [ConversationId(row[0]) for row in await db.fetch(TAKES_PART, user_id)]


WORDS = """
SELECT ARRAY(SELECT DISTINCT w FROM unnest(ARRAY[u.email, u.name, u.display_name, u.image, u.bio, u.location, u.website,
    u.custom_status]) w WHERE char_length(w) > 2)
FROM "user" u WHERE u.id = $1
"""


async def words(db: Db, user_id: UserId) -> list[str]:
    """Return what a user is known by, to be looked for afterwards."""
    return list(await db.fetchval(WORDS, user_id) or ())


# The others' devices are told by the row itself, as of any relationship that ends: it says nothing any more, and
# `relationships.forget` deletes it after a while. A device that was deleted a row of would read all its own rows anew,
# and the followers of one user are many (docs/decisions/0054). Nobody is told of another's block or mute by its end.
RELATED = f"""
SELECT o.id FROM (
    SELECT there.id FROM unnest('{{friend,block,follow,mute}}'::text[]) AS kind CROSS JOIN LATERAL (
        SELECT r.from_user_id AS id FROM user_relationship r
        WHERE r.to_user_id = $1 AND r.type = kind AND r.from_user_id > $2 AND NOT {BLANK}
        ORDER BY r.from_user_id LIMIT $3
    ) there
    UNION
    (SELECT r.to_user_id FROM user_relationship r
    WHERE r.from_user_id = $1 AND r.to_user_id > $2 AND (r.type IN ('block', 'mute') OR NOT {BLANK})
    ORDER BY r.to_user_id LIMIT $3)
) o ORDER BY o.id LIMIT $3
"""  # noqa: S608 - a condition is put in
RELATED_AT_ONCE = 500
UNRELATE = f"""
WITH gone AS (
    DELETE FROM user_relationship r
    WHERE r.from_user_id = $1 AND r.to_user_id = ANY($2) AND r.type IN ('block', 'mute')
), ended AS MATERIALIZED (
    SELECT r.id, r.to_user_id AS other FROM user_relationship r
    WHERE r.from_user_id = $1 AND r.to_user_id = ANY($2) AND r.type IN ('friend', 'follow') AND NOT {BLANK}
    UNION ALL
    SELECT r.id, r.from_user_id FROM user_relationship r
    WHERE r.from_user_id = ANY($2) AND r.to_user_id = $1 AND NOT {BLANK}
), moved AS MATERIALIZED (
    UPDATE "user" u SET version = u.version + 1 WHERE u.id = ANY(ARRAY(SELECT other FROM ended))
    RETURNING u.id, u.version
)
UPDATE user_relationship r SET status = 'inactive', request_message = NULL, response_message = NULL,
    accepted_at = NULL, can_see_online_status = true, can_send_messages = true, can_see_profile = true,
    notifications_enabled = true, updated_at = now(),
    from_version = CASE WHEN e.other = r.from_user_id THEN m.version ELSE r.from_version END,
    to_version = CASE WHEN e.other = r.to_user_id THEN m.version ELSE r.to_version END
FROM ended e JOIN moved m ON m.id = e.other WHERE r.id = e.id
"""  # noqa: S608 - a condition is put in


async def related(db: Db, user_id: UserId, after: UserId) -> list[UserId]:
    """Return those whom a user has a relationship with that says something, or who have one with the user: the first
    after an id, at most `RELATED_AT_ONCE`.
    """
    return [UserId(row[0]) for row in await db.fetch(RELATED, user_id, after, RELATED_AT_ONCE)]


async def unrelate(db: Db, user_id: UserId, others: list[UserId]) -> None:
    """End what is between a user and others, and delete the words of it. Under the locks of all of them."""
    await db.execute(UNRELATE, user_id, others)


# One after the other, under the user's lock. The row stays, for what they said refers to it. Its address is random:
# nobody can have one that makes erasing fail.
FORGET = (
    'DELETE FROM verification v USING "user" u WHERE u.id = $1 AND v.identifier = u.email',
    "DELETE FROM session WHERE user_id = $1",
    "DELETE FROM account WHERE user_id = $1",
    f"DELETE FROM user_relationship r WHERE r.from_user_id = $1 AND (r.type IN ('block', 'mute') OR NOT {BLANK})",  # noqa: S608
    f"DELETE FROM user_relationship r WHERE r.to_user_id = $1 AND NOT {BLANK}",  # noqa: S608 - a condition is put in
    "DELETE FROM approach WHERE from_user_id = $1 OR to_user_id = $1",
    "DELETE FROM draft WHERE user_id = $1",
    "DELETE FROM scheduled_message WHERE sender_id = $1",
    "DELETE FROM message_star WHERE user_id = $1",
    "DELETE FROM push_endpoint WHERE user_id = $1",
    """
    DELETE FROM message_edit e USING message m
    WHERE m.sender_id = $1 AND m.is_deleted AND e.message_id = m.id AND e.conversation_id = m.conversation_id
    """,
    """
    UPDATE thread_follow SET is_following = false, last_read_order = 0 WHERE user_id = $1
    """,
    "UPDATE report SET reason = 'Erased' WHERE reporter_id = $1",
    """
    UPDATE conversation_participant SET pin_order = NULL, is_hidden = false, is_muted = false, muted_until = NULL,
        notification_level = 'all', last_read_at = NULL, last_sent_at = NULL, delivered_at = NULL,
        unread_from_id = NULL, unread_from_version = NULL
    WHERE user_id = $1
    """,
    """
    UPDATE "user" SET name = 'Deleted user', email = 'erased-' || gen_random_uuid() || '@invalid',
        email_verified = false, image = NULL, display_name = NULL, bio = NULL, location = NULL, website = NULL,
        custom_status = NULL, custom_status_until = NULL, status = 'offline', is_online = false, last_seen_at = NULL,
        is_active = false,
        is_deleted = true, deleted_at = coalesce(deleted_at, now()), is_private = false, is_admin = false,
        erased_at = coalesce(erased_at, now()), updated_at = now(), version = version + 1, quiet_from = NULL,
        quiet_until = NULL, time_zone = 'UTC', feed_seen_at = NULL, last_close = NULL
    WHERE id = $1
    """,
)


async def forget(db: Db, user_id: UserId) -> None:
    """Take away everything of a user that is not what they said. Under the user's lock."""
    for STATEMENT in FORGET:  # noqa: N806 - a constant of this file, as all that is asked of the database
        await db.execute(STATEMENT, user_id)


_SPECIAL = re.compile(r"[\\%_]")


class Trace(NamedTuple):
    """Where something is left: a column, whether it holds what people said, and in how many rows."""

    place: str
    is_said: bool
    found: int


TRACES = "SELECT * FROM traces($1)"
IS_ERASED = f"""
SELECT NOT EXISTS (SELECT FROM account WHERE user_id = $1) AND NOT EXISTS (SELECT FROM session WHERE user_id = $1)
    AND NOT EXISTS (SELECT FROM user_relationship r WHERE $1 IN (r.from_user_id, r.to_user_id) AND NOT {BLANK})
    AND NOT EXISTS (SELECT FROM approach WHERE $1 IN (from_user_id, to_user_id))
    AND NOT EXISTS (SELECT FROM draft WHERE user_id = $1) AND NOT EXISTS (SELECT FROM message_star WHERE user_id = $1)
    AND NOT EXISTS (SELECT FROM scheduled_message WHERE sender_id = $1)
    AND NOT EXISTS (SELECT FROM push_endpoint WHERE user_id = $1)
    AND NOT EXISTS (SELECT FROM thread_follow WHERE user_id = $1 AND is_following)
    AND NOT EXISTS (SELECT FROM conversation_participant WHERE user_id = $1 AND status IN ('active', 'invited'))
    AND EXISTS (
        SELECT FROM "user" u WHERE u.id = $1 AND u.erased_at IS NOT NULL AND u.name = 'Deleted user'
            AND u.email LIKE 'erased-%@invalid'
            AND coalesce(u.image, u.display_name, u.bio, u.location, u.website, u.custom_status) IS NULL
    )
"""  # noqa: S608 - a condition is put in


async def traces(db: Db, user_id: UserId, texts: list[str]) -> list[Trace]:
    """Return where something of a user is left: rows of theirs, or any of the texts anywhere."""
    found = [] if await db.fetchval(IS_ERASED, user_id) else [Trace("rows of the user", is_said=False, found=1)]
    needles = ["%" + _SPECIAL.sub(r"\\\g<0>", text) + "%" for text in texts]
    return found + [Trace(*row) for row in await db.fetch(TRACES, needles)]
