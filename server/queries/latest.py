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
# Further pages also cover conversations with later activity. Others come first, so that none of them is cut off.
AGAIN = f"""
SELECT coalesce(array_agg(l.conversation_id), '{{}}'), coalesce(array_agg(l.role), '{{}}'),
    coalesce(array_agg(l.after), '{{}}')
FROM (
    SELECT p.conversation_id, p.role, visible_after(c, p) AS after
    FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = $1 AND p.status = 'active' AND {ACTIVE_AT} >= $2::timestamptz
    ORDER BY {ACTIVE_AT}, c.id DESC LIMIT {2 * SEARCHED}
) l
"""  # noqa: S608 - constants are put in


async def newest(db: Db, user_id: UserId) -> Latest:
    """Return the conversations that the first page covers."""
    return Latest.of(*(await db.fetch(NEWEST, user_id))[0])


async def again(db: Db, user_id: UserId, since: datetime) -> Latest:
    """Return the conversations that a further page covers. `since` is from the first one."""
    conversation_ids, roles, after = (await db.fetch(AGAIN, user_id, since))[0]
    return Latest(conversation_ids, roles, after, since)
