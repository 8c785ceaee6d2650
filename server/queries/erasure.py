"""Erasure of users. Their messages stay, and all other data of theirs is deleted."""

import re
from collections.abc import Collection
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from protocol.ids import ConversationId, UserId
from server.db.database import Db
from server.queries.relationships import BLANK

MAX_DUE = 10
"""Max users that `due` returns."""

DUE = """
SELECT id FROM "user" WHERE is_deleted AND erased_at IS NULL AND deleted_at < now() - $1::interval AND id <> ALL ($2)
ORDER BY deleted_at LIMIT $3
"""


async def due(db: Db, grace: timedelta, besides: Collection[UserId]) -> list[UserId]:
    """Return users whose grace period is over, the earliest first, except those in `besides`. At most `MAX_DUE`."""
    return [UserId(row[0]) for row in await db.fetch(DUE, grace, list(besides), MAX_DUE)]


# First, the user can no longer join or connect. Statements that add participants check under the user's lock that the
# user is active. Logins are deleted now, so that nobody restores a half-erased account.
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
    """Deactivate a user for ever. With `grace`, return False, without an effect, unless the user deleted the account at
    least that long ago. Requires the user's lock.
    """
    if grace is not None and not await db.fetchval(IS_DUE, user_id, grace):
        return False
    for STATEMENT in SHUT_OUT:  # noqa: N806 - a constant, as all SQL
        await db.execute(STATEMENT, user_id)
    return True


TAKES_PART = """
SELECT p.conversation_id FROM conversation_participant p
WHERE p.user_id = $1 AND p.status IN ('active', 'invited') ORDER BY p.conversation_id
"""
# A deleted conversation has no events and no owner any more, and `participants.leave` does not find it.
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
    """Make a user leave a deleted conversation."""
    await db.execute(LEAVE_DELETED, conversation_id, user_id)


async def conversations(db: Db, user_id: UserId) -> list[ConversationId]:
    """Return the conversations that a user participates in or is invited to."""
    return [ConversationId(row[0]) for row in await db.fetch(TAKES_PART, user_id)]


WORDS = """
SELECT ARRAY(SELECT DISTINCT w FROM unnest(ARRAY[u.email, u.name, u.display_name, u.image, u.bio, u.location, u.website,
    u.custom_status]) w WHERE char_length(w) > 2)
FROM "user" u WHERE u.id = $1
"""


async def words(db: Db, user_id: UserId) -> list[str]:
    """Return the texts that identify a user, to search for them afterwards."""
    return list(await db.fetchval(WORDS, user_id) or ())


# The row itself notifies the other user's devices, as with any relationship that ends. `relationships.forget` deletes
# it later. Deleting it now would make devices read all their own rows again, and one user may have many followers
# (docs/decisions/0054). Blocks and mutes are never visible to the other user, even at their end.
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
    """Return users who have a relationship with a user that is not blank, in either direction. They are the first after
    an id, at most `RELATED_AT_ONCE`.
    """
    return [UserId(row[0]) for row in await db.fetch(RELATED, user_id, after, RELATED_AT_ONCE)]


async def unrelate(db: Db, user_id: UserId, others: list[UserId]) -> None:
    """End the relationships of a user with others, and delete their texts. Requires the locks of all of them."""
    await db.execute(UNRELATE, user_id, others)


PORTION = 500
"""Max rows of each kind that one transaction deletes or clears."""
# Each statement proceeds in the order of an index, from where the one before ended. A user may have any number of these
# rows, and most of them stay. The statement returns the last key that it visited.
CLEAR_MEMBERSHIPS = """
WITH page AS MATERIALIZED (
    SELECT p.conversation_id FROM conversation_participant p
    WHERE p.user_id = $1 AND p.conversation_id > $2 ORDER BY p.conversation_id LIMIT $3
), cleared AS (
    UPDATE conversation_participant p SET pin_order = NULL, is_hidden = false, is_muted = false, muted_until = NULL,
        notification_level = 'all', notifications_enabled = true, last_read_at = NULL, last_sent_at = NULL,
        delivered_at = NULL, unread_from_id = NULL, unread_from_version = NULL
    WHERE p.conversation_id = ANY(ARRAY(SELECT conversation_id FROM page)) AND p.user_id = $1
)
SELECT max(conversation_id::text)::uuid FROM page
"""
CLEAR_THREADS = """
WITH page AS MATERIALIZED (
    SELECT t.root_id, t.last_read_order FROM thread_follow t
    WHERE t.user_id = $1 AND NOT t.is_following AND t.root_id > $2 ORDER BY t.root_id LIMIT $3
), cleared AS (
    UPDATE thread_follow t SET last_read_order = 0 FROM page
    WHERE page.last_read_order > 0 AND t.root_id = page.root_id AND t.user_id = $1
)
SELECT max(root_id::text)::uuid FROM page
"""
# A message may have a thousand edits. Those beyond a portion are deleted by the next run of the statement.
FORGET_EDITS = """
WITH page AS MATERIALIZED (
    SELECT m.id, m.conversation_id, m.is_deleted FROM message m
    WHERE m.sender_id = $1 AND m.id > $2 ORDER BY m.id LIMIT $3
), kept AS MATERIALIZED (
    SELECT e.id FROM page JOIN message_edit e ON e.message_id = page.id AND e.conversation_id = page.conversation_id
    WHERE page.is_deleted LIMIT $3
), gone AS (
    DELETE FROM message_edit e USING kept WHERE e.id = kept.id
)
SELECT CASE WHEN (SELECT count(*) FROM kept) < $3 THEN (SELECT max(id::text)::uuid FROM page) ELSE $2 END
"""
# Several reports may have the same time, so the reason marks those that are done.
CLEAR_REPORTS = """
WITH page AS MATERIALIZED (
    SELECT r.id, r.created_at FROM report r
    WHERE r.reporter_id = $1 AND r.reason <> 'Erased'
        AND r.created_at >= coalesce((SELECT o.created_at FROM report o WHERE o.id = $2), '-infinity')
    ORDER BY r.created_at LIMIT $3
), cleared AS (
    UPDATE report r SET reason = 'Erased' FROM page WHERE r.id = page.id
)
SELECT id FROM page WHERE created_at = (SELECT max(created_at) FROM page) LIMIT 1
"""
CLEARED = (CLEAR_MEMBERSHIPS, CLEAR_THREADS, FORGET_EDITS, CLEAR_REPORTS)


class Cleared(NamedTuple):
    """The progress of clearing a user's remaining rows: the statement, and the key after which it continues."""

    step: int = 0
    after: UUID = UUID(int=0)


async def clear(db: Db, user_id: UserId, cleared: Cleared) -> Cleared | None:
    """Clear a portion of a user's remaining rows. Return where to continue, or None at the end. Requires the user's
    lock.
    """
    STATEMENT = CLEARED[cleared.step]  # noqa: N806 - a constant, as all SQL
    after: UUID | None = await db.fetchval(STATEMENT, user_id, cleared.after, PORTION)
    if after is not None:
        return Cleared(cleared.step, after)
    return Cleared(cleared.step + 1) if cleared.step + 1 < len(CLEARED) else None


FORGET_APPROACHES = """
WITH gone AS MATERIALIZED (SELECT o.to_user_id, o.kind FROM approach o WHERE o.from_user_id = $1 LIMIT $2)
DELETE FROM approach a USING gone
WHERE a.from_user_id = $1 AND a.to_user_id = gone.to_user_id AND a.kind = gone.kind
RETURNING 1
"""
FORGET_APPROACHED = """
WITH gone AS MATERIALIZED (SELECT o.from_user_id, o.kind FROM approach o WHERE o.to_user_id = $1 LIMIT $2)
DELETE FROM approach a USING gone
WHERE a.from_user_id = gone.from_user_id AND a.to_user_id = $1 AND a.kind = gone.kind
RETURNING 1
"""
FORGET_DRAFTS = """
WITH gone AS MATERIALIZED (SELECT o.conversation_id FROM draft o WHERE o.user_id = $1 LIMIT $2)
DELETE FROM draft d USING gone
WHERE d.user_id = $1 AND d.conversation_id = gone.conversation_id
RETURNING 1
"""
FORGET_SCHEDULED = """
WITH gone AS MATERIALIZED (SELECT o.id FROM scheduled_message o WHERE o.sender_id = $1 LIMIT $2)
DELETE FROM scheduled_message s USING gone
WHERE s.id = gone.id
RETURNING 1
"""
FORGET_STARS = """
WITH gone AS MATERIALIZED (SELECT o.message_id FROM message_star o WHERE o.user_id = $1 LIMIT $2)
DELETE FROM message_star s USING gone
WHERE s.user_id = $1 AND s.message_id = gone.message_id
RETURNING 1
"""
UNFOLLOW = """
WITH page AS MATERIALIZED (
    SELECT o.root_id FROM thread_follow o WHERE o.user_id = $1 AND o.is_following ORDER BY o.root_id LIMIT $2
)
UPDATE thread_follow t SET is_following = false, last_read_order = 0
FROM page
WHERE t.root_id = page.root_id AND t.user_id = $1
RETURNING 1
"""
FORGOTTEN = (FORGET_APPROACHES, FORGET_APPROACHED, FORGET_DRAFTS, FORGET_SCHEDULED, FORGET_STARS, UNFOLLOW)
# Tables with few rows of a user, and at last the user's own row. It stays, because messages refer to it. Its address is
# random, so that nobody can take the address in advance and make erasures fail.
FORGET = (
    'DELETE FROM verification v USING "user" u WHERE u.id = $1 AND v.identifier = u.email',
    "DELETE FROM session WHERE user_id = $1",
    "DELETE FROM account WHERE user_id = $1",
    "DELETE FROM push_endpoint WHERE user_id = $1",
    """
    UPDATE "user" SET name = 'Deleted user', email = 'erased-' || gen_random_uuid() || '@invalid',
        face_version = face_version + 1, email_verified = false, image = NULL, display_name = NULL, bio = NULL,
        location = NULL, website = NULL, custom_status = NULL, custom_status_until = NULL, status = 'offline',
        is_online = false, last_seen_at = NULL, is_active = false, is_deleted = true,
        deleted_at = coalesce(deleted_at, now()), is_private = false, is_admin = false,
        erased_at = coalesce(erased_at, now()), updated_at = now(), version = version + 1, quiet_from = NULL,
        quiet_until = NULL, time_zone = 'UTC', feed_seen_at = NULL, last_close = NULL, visible_since = NULL
    WHERE id = $1
    """,
)


async def forget_some(db: Db, user_id: UserId) -> bool:
    """Delete a portion of the rows that users may have many of. Return whether there may be more. Requires the user's
    lock.
    """
    for STATEMENT in FORGOTTEN:  # noqa: N806 - a constant, as all SQL
        if len(await db.fetch(STATEMENT, user_id, PORTION)) == PORTION:
            return True
    return False


REFERENCES = 'SELECT FROM "user" WHERE id = $1 FOR UPDATE'
"""Transactions that have inserted rows which refer to the user hold FOR KEY SHARE on the user's row until
they commit.
"""


async def lock_out_references(db: Db, user_id: UserId) -> None:
    """Lock a user after the transactions that have inserted rows which refer to the user, and before later ones.
    `is_unerased_now` and `users.keep` wait for this lock.
    """
    await db.execute(REFERENCES, user_id)


async def forget(db: Db, user_id: UserId) -> None:
    """Delete the remaining rows of a user, after `forget_some`, in the same transaction. Frames in flight may have
    written rows after the user was shut out.
    """
    for STATEMENT in FORGET:  # noqa: N806 - a constant, as all SQL
        await db.execute(STATEMENT, user_id)


_SPECIAL = re.compile(r"[\\%_]")


class Trace(NamedTuple):
    """Remaining data of a user: the column, whether it has content of messages, and the number of rows."""

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
    """Return where data of a user remains: the user's rows, and any of the texts in any column."""
    found = [] if await db.fetchval(IS_ERASED, user_id) else [Trace("rows of the user", is_said=False, found=1)]
    needles = ["%" + _SPECIAL.sub(r"\\\g<0>", text) + "%" for text in texts]
    return found + [Trace(*row) for row in await db.fetch(TRACES, needles)]
