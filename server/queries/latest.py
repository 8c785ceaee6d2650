"""The conversations that searches and the feed cover: those of a user with the latest activity."""

from datetime import datetime

from protocol.ids import UserId
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


async def since(db: Db, user_id: UserId) -> datetime | None:
    """Return the last activity of the oldest conversation that counts. Return None if all conversations of the user
    count.
    """
    rows = await db.fetch(SINCE, user_id)
    return rows[0][0] if len(rows) > 1 else None
