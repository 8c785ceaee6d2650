"""Limits on rows of users. Each function counts after a write, in the same transaction, and raises to undo the write.

The transaction has locked the user's row before, so no other one adds rows of that user meanwhile.
"""

from collections.abc import Sequence

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import (
    MAX_CONVERSATIONS_A_DAY,
    MAX_MEMBERSHIPS,
    MAX_RELATIONSHIPS,
    MAX_REMOVED_STARS,
    MAX_REPORTS_A_DAY,
    MAX_REQUESTS_RECEIVED,
    MAX_REQUESTS_SENT,
    MAX_STARS,
    MAX_THREAD_FOLLOWS,
)
from protocol.values import RelationshipKind
from server.db.database import Db

RETRY_MS = 3_600_000
"""`retry_after_ms` of the limits per day."""

MADE = """
SELECT count(*) FROM conversation c WHERE c.created_by = $1 AND c.created_at > now() - interval '1 day'
"""


async def require_made(db: Db, user_id: UserId, path: str, *, more: int = 0) -> None:
    """Raise Refused if a user has created too many conversations within a day. `path` names the new one. Requires the
    user's lock. With `more`, count that many further ones, before the lock.
    """
    if int(await db.fetchval(MADE, user_id)) + more > MAX_CONVERSATIONS_A_DAY:
        raise Refused(
            ErrorCode.RATE_LIMITED,
            f"You can create at most {MAX_CONVERSATIONS_A_DAY} conversations a day. Retry later.",
            path=path,
            retry_after_ms=RETRY_MS,
        )


# Participants of a deleted conversation keep their status and cannot leave, so it does not count. Users are counted
# exactly only if the cheaper count exceeds the limit. A frame may name a hundred users, and the conversation is locked
# meanwhile.
MEMBERSHIPS = """
SELECT EXISTS (
    SELECT FROM unnest($1::uuid[]) AS them (id) WHERE CASE WHEN (
        SELECT count(*) FROM conversation_participant p WHERE p.user_id = them.id AND p.status = 'active'
    ) > $2 THEN (
        SELECT count(*) FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.user_id = them.id AND p.status = 'active'
    ) > $2 ELSE false END
)
"""


async def require_memberships(db: Db, user_ids: Sequence[UserId], path: str) -> None:
    """Raise Refused if one of the users participates in too many conversations. Requires the users' locks."""
    if await db.fetchval(MEMBERSHIPS, list(user_ids), MAX_MEMBERSHIPS):
        raise too_many_memberships(path)


def too_many_memberships(path: str) -> Refused:
    """Return the error for a user who participates in too many conversations."""
    return Refused(
        ErrorCode.CONFLICT,
        f"A user can participate in at most {MAX_MEMBERSHIPS} conversations. Leave one, or name other users.",
        path=path,
    )


STARS = "SELECT count(*) FROM message_star s WHERE s.user_id = $1 AND NOT s.is_removed"


async def require_stars(db: Db, user_id: UserId) -> None:
    """Raise Refused if a user has starred too many messages. Requires the user's lock."""
    if int(await db.fetchval(STARS, user_id)) > MAX_STARS:
        raise Refused(ErrorCode.CONFLICT, f"You can star at most {MAX_STARS} messages. Unstar one first.")


FORGET_STARS = """
WITH due AS MATERIALIZED (
    SELECT o.message_id FROM message_star o WHERE o.user_id = $1 AND o.is_removed
    ORDER BY o.user_version DESC OFFSET $2 LIMIT $3
), gone AS (
    DELETE FROM message_star s USING due WHERE s.user_id = $1 AND s.message_id = due.message_id
    RETURNING s.user_version
)
UPDATE "user" u SET forgotten_version = greatest(u.forgotten_version, (SELECT max(user_version) FROM gone))
WHERE u.id = $1 AND EXISTS (SELECT FROM gone)
"""


async def forget_stars(db: Db, user_id: UserId) -> None:
    """Delete the oldest tombstones of stars beyond `MAX_REMOVED_STARS`. Requires the user's lock."""
    await db.execute(FORGET_STARS, user_id, MAX_REMOVED_STARS, FORGOTTEN_AT_ONCE)


# Ended relationships do not count. They stay as tombstones, and would otherwise prevent new blocks. A rejected request
# counts, because it has an effect: its sender cannot send another one.
RELATIONSHIPS = """
SELECT count(*) FROM user_relationship r WHERE r.from_user_id = $1 AND r.type = $2 AND r.status <> 'inactive'
"""


async def require_relationships(db: Db, user_id: UserId, kind: RelationshipKind) -> None:
    """Raise Refused if a user has too many relationships of a kind that have not ended. Requires the user's lock."""
    if int(await db.fetchval(RELATIONSHIPS, user_id, kind)) > MAX_RELATIONSHIPS:
        raise Refused(
            ErrorCode.CONFLICT,
            f"You can have at most {MAX_RELATIONSHIPS} relationships of the kind `{kind}`. End one first.",
            path="user_id",
        )


REQUESTS = """
SELECT (SELECT count(*) FROM user_relationship r
        WHERE r.from_user_id = $1 AND r.type = 'friend' AND r.status = 'pending'),
    (SELECT count(*) FROM user_relationship r
        WHERE r.to_user_id = $2 AND r.type = 'friend' AND r.status = 'pending')
"""


async def require_requests(db: Db, user_id: UserId, other: UserId) -> None:
    """Raise Refused if a user has sent, or `other` has received, too many unanswered friend requests. Requires both
    users' locks.
    """
    sent, received = await db.fetchrow(REQUESTS, user_id, other) or (0, 0)
    if sent > MAX_REQUESTS_SENT:
        raise Refused(
            ErrorCode.CONFLICT,
            f"You can have at most {MAX_REQUESTS_SENT} pending friend requests. Withdraw one first.",
        )
    if received > MAX_REQUESTS_RECEIVED:
        raise Refused(
            ErrorCode.CONFLICT, "This user has too many pending friend requests. Retry later.", path="user_id"
        )


REPORTS = """
SELECT count(*) FROM report r WHERE r.reporter_id = $1 AND r.created_at > now() - interval '1 day'
"""


async def require_reports(db: Db, user_id: UserId) -> None:
    """Raise Refused if a user has reported too many messages within a day. Requires the user's lock."""
    if int(await db.fetchval(REPORTS, user_id)) > MAX_REPORTS_A_DAY:
        raise Refused(
            ErrorCode.RATE_LIMITED,
            f"You can report at most {MAX_REPORTS_A_DAY} messages a day. Retry later.",
            path="message_id",
            retry_after_ms=RETRY_MS,
        )


# Rows of replies do not count, because each belongs to a message of the user. A row has a version once the user
# follows, unfollows or reads the thread.
THREADS = """
SELECT count(*) FROM thread_follow t WHERE t.user_id = $1 AND t.user_version > 0 AND NOT t.has_replied
"""
FORGET_THREADS = """
WITH due AS MATERIALIZED (
    SELECT o.root_id FROM thread_follow o
    WHERE o.user_id = $1 AND o.user_version > 0 AND NOT o.is_following AND NOT o.has_replied
        -- Without this row, the author of a thread would follow it again with the next reply.
        AND NOT EXISTS (
            SELECT FROM message m
            WHERE m.id = o.root_id AND (m.conversation_id = o.conversation_id) IS TRUE AND m.sender_id = $1
        )
    ORDER BY o.user_version LIMIT $2
), gone AS (
    DELETE FROM thread_follow t USING due WHERE t.user_id = $1 AND t.root_id = due.root_id
    RETURNING t.user_version
)
UPDATE "user" u SET forgotten_version = greatest(u.forgotten_version, (SELECT max(user_version) FROM gone))
WHERE u.id = $1 AND EXISTS (SELECT FROM gone)
"""
FORGOTTEN_AT_ONCE = 100
"""Max rows that one frame deletes."""


async def require_threads(db: Db, user_id: UserId) -> None:
    """If a user has too many rows, delete the oldest read positions in threads without a follow or a reply. Raises
    Refused if too many threads are followed. Requires the user's lock.
    """
    if int(await db.fetchval(THREADS, user_id)) <= MAX_THREAD_FOLLOWS:
        return
    if await db.execute(FORGET_THREADS, user_id, FORGOTTEN_AT_ONCE) == "UPDATE 0":
        raise Refused(
            ErrorCode.CONFLICT,
            f"You can follow at most {MAX_THREAD_FOLLOWS} threads. Unfollow one first.",
            path="message_id",
        )
