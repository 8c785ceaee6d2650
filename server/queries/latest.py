"""The conversations that searches and the feed cover: those of a user with the latest activity."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self

from protocol.ids import ConversationId, UserId
from server.db.database import Db
from server.queries.conversation_views import ACTIVE_AT

SEARCHED = 200
"""Max conversations that a search or the feed covers. The search index is queried for each of them, and each is
compared with each message. Thousands took longer than a search may.
"""
# Further pages also cover conversations with later activity. Others come first, so that none of them is cut off.
LATEST = f"""
    SELECT p.conversation_id, p.role, visible_after(c, p) AS after FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = {{user}} AND p.status = 'active' {{also}}
        AND ({{since}}::timestamptz IS NULL OR {ACTIVE_AT} >= {{since}})
    ORDER BY CASE WHEN {{since}} IS NULL THEN {ACTIVE_AT} END DESC, {ACTIVE_AT}, c.id DESC
    LIMIT CASE WHEN {{since}} IS NULL THEN {SEARCHED} ELSE {2 * SEARCHED} END
"""  # noqa: S608 - constants are put in
"""These conversations, with the user's role and the version after which the user sees messages. `since` is the result
of `since` for the first page, and NULL stands for now.
"""
SINCE = f"""
SELECT {ACTIVE_AT} FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.user_id = $1 AND p.status = 'active'
ORDER BY {ACTIVE_AT} DESC, c.id DESC OFFSET {SEARCHED - 1} LIMIT 2
"""  # noqa: S608 - constants are put in


class Latest(NamedTuple):
    """These conversations, with the user's roles and the versions after which the user sees messages. `since` is the
    last activity of the oldest one. It is None if they are all conversations of the user.
    """

    conversation_ids: Sequence[ConversationId]
    roles: Sequence[str]
    after: Sequence[int]
    since: datetime | None

    @classmethod
    def of(cls, *columns: Sequence[Any]) -> Self:
        """Return the newest conversations. `columns` is a result of `AS_COLUMNS`, with at most one more."""
        conversation_ids, roles, after, active_at = columns
        since = active_at[SEARCHED - 1] if len(active_at) > SEARCHED else None
        return cls(conversation_ids[:SEARCHED], roles[:SEARCHED], after[:SEARCHED], since)

    @property
    def columns(self) -> tuple[Sequence[ConversationId], Sequence[str], Sequence[int]]:
        """These conversations as parameters of a statement."""
        return self.conversation_ids, self.roles, self.after


AS_COLUMNS = """
    coalesce(array_agg(l.conversation_id), '{}'), coalesce(array_agg(l.role), '{}'),
    coalesce(array_agg(l.after), '{}'), coalesce(array_agg(l.active_at), '{}')
"""
"""The columns of conversations `l`, in one row."""
NEWEST = f"""
SELECT {AS_COLUMNS} FROM (
    SELECT p.conversation_id, p.role, visible_after(c, p) AS after, {ACTIVE_AT} AS active_at
    FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = $1 AND p.status = 'active'
    ORDER BY {ACTIVE_AT} DESC, c.id DESC LIMIT {SEARCHED + 1}
) l
"""  # noqa: S608 - constants are put in
AGAIN = f"""
SELECT coalesce(array_agg(l.conversation_id), '{{}}'), coalesce(array_agg(l.role), '{{}}'),
    coalesce(array_agg(l.after), '{{}}')
FROM ({LATEST.format(user="$1", also="", since="$2::timestamptz")}) l
"""  # noqa: S608 - constants are put in


async def newest(db: Db, user_id: UserId) -> Latest:
    """Return the conversations that the first page of a feed covers."""
    return Latest.of(*(await db.fetch(NEWEST, user_id))[0])


async def again(db: Db, user_id: UserId, since: datetime) -> Latest:
    """Return the conversations that a further page covers. `since` is from the first one."""
    conversation_ids, roles, after = (await db.fetch(AGAIN, user_id, since))[0]
    return Latest(conversation_ids, roles, after, since)


async def since(db: Db, user_id: UserId) -> datetime | None:
    """Return the last activity of the oldest conversation that counts. Return None if all conversations of the user
    count.
    """
    rows = await db.fetch(SINCE, user_id)
    return rows[0][0] if len(rows) > 1 else None
