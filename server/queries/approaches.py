"""Approaches: how often a user contacted another one within a day, or changed the other's row. The statement that
allows one counts it.
"""

from collections.abc import Sequence
from typing import Literal, NoReturn

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_ADDED_A_DAY, MAX_APPROACHES_A_DAY
from server.db.database import Db

Kind = Literal["add", "invite", "friend", "follow", "block", "mute", "switch"]
SAID: dict[Kind, str] = {
    "add": "add", "invite": "invite", "friend": "send a friend request to", "follow": "follow", "block": "block",
    "mute": "mute", "switch": "turn off switches for",
}  # fmt: skip
MAX_DELETED = 1_000
"""Max counts that one statement deletes."""

# A user without a returned row has reached the limit.
COUNT = """
INSERT INTO approach AS a (from_user_id, to_user_id, kind)
SELECT $1, named.user_id, $3 FROM unnest($2::uuid[]) AS named (user_id) ORDER BY named.user_id
ON CONFLICT (from_user_id, to_user_id, kind) DO UPDATE SET
    made = CASE WHEN a.began_at > now() - interval '1 day' THEN a.made + 1 ELSE 1 END,
    began_at = CASE WHEN a.began_at > now() - interval '1 day' THEN a.began_at ELSE now() END
    WHERE a.made < $4 OR a.began_at <= now() - interval '1 day'
RETURNING a.to_user_id
"""
FULL = """
SELECT a.to_user_id FROM approach a
WHERE a.from_user_id = $1 AND a.to_user_id = ANY($2) AND a.kind = $3 AND a.made >= $4
    AND a.began_at > now() - interval '1 day'
"""
WAIT = """
SELECT ceil(1000 * extract(epoch FROM max(a.began_at) + interval '1 day' - now()))::bigint FROM approach a
WHERE a.from_user_id = $1 AND a.to_user_id = ANY($2) AND a.kind = $3
"""


async def require(db: Db, kind: Kind, user_id: UserId, others: Sequence[UserId]) -> None:
    """Raise Refused if a user has approached one of the others too often within a day. This precedes the locks, so that
    a refused frame locks no stranger.
    """
    if others and (full := await db.fetch(FULL, user_id, list(others), kind, _most(kind))):
        await _refuse(db, kind, user_id, [row[0] for row in full])


async def count(db: Db, kind: Kind, user_id: UserId, others: Sequence[UserId]) -> None:
    """Count an approach of a user to others. Raises Refused if one of them was approached too often within a day.
    Requires the user's lock.
    """
    if not others:
        return
    allowed = {row[0] for row in await db.fetch(COUNT, user_id, list(others), kind, _most(kind))}
    if refused := [other for other in others if other not in allowed]:
        await _refuse(db, kind, user_id, refused)


def _most(kind: Kind) -> int:
    return MAX_ADDED_A_DAY if kind == "add" else MAX_APPROACHES_A_DAY


async def _refuse(db: Db, kind: Kind, user_id: UserId, others: Sequence[UserId]) -> NoReturn:
    wait = await db.fetchval(WAIT, user_id, others, kind)
    raise Refused(
        ErrorCode.RATE_LIMITED,
        f"You can {SAID[kind]} the same user at most {_most(kind)} times a day. Retry after `retry_after_ms`.",
        path="participants" if kind in {"add", "invite"} else "user_id",
        retry_after_ms=max(1, int(wait or 1)),
    )


EXPIRE = """
WITH due AS MATERIALIZED (
    SELECT o.from_user_id, o.to_user_id, o.kind FROM approach o WHERE o.began_at <= now() - interval '1 day'
    ORDER BY o.began_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
DELETE FROM approach a USING due
WHERE a.from_user_id = due.from_user_id AND a.to_user_id = due.to_user_id AND a.kind = due.kind
RETURNING true
"""


async def expire(db: Db) -> bool:
    """Delete counts that are older than a day, at most `MAX_DELETED`. Return whether there may be more."""
    return len(await db.fetch(EXPIRE, MAX_DELETED)) == MAX_DELETED
