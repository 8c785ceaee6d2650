"""The conversations that a search and the feed look through: those of a user that were active last."""

from datetime import datetime

from protocol.ids import UserId
from server.db.database import Db
from server.queries.conversations import ACTIVE_AT

SEARCHED = 200
"""Max conversations that a search or the feed looks through. The index of words is asked for each of them by name, and
each is compared with each message: for thousands, that took longer than a search may.
"""
# On further pages, conversations that were active in between count, too. Those that were not come first, so that none
# of them drops out.
LATEST = f"""
    SELECT p.conversation_id, p.role, visible_after(c, p) AS after FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = {{user}} AND p.status = 'active' {{also}}
        AND ({{since}}::timestamptz IS NULL OR {ACTIVE_AT} >= {{since}})
    ORDER BY CASE WHEN {{since}} IS NULL THEN {ACTIVE_AT} END DESC, {ACTIVE_AT}, c.id DESC
    LIMIT CASE WHEN {{since}} IS NULL THEN {SEARCHED} ELSE {2 * SEARCHED} END
"""  # noqa: S608 - constants are put in
"""These conversations, with the user's role and the version after which they see messages. `since` is what `since`
returned for the first page; null stands for now.
"""
SINCE = f"""
SELECT {ACTIVE_AT} FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.user_id = $1 AND p.status = 'active'
ORDER BY {ACTIVE_AT} DESC, c.id DESC OFFSET {SEARCHED - 1} LIMIT 2
"""  # noqa: S608 - constants are put in


async def since(db: Db, user_id: UserId) -> datetime | None:
    """Return when the last of the latest conversations was active; None if they are all of the user's."""
    rows = await db.fetch(SINCE, user_id)
    return rows[0][0] if len(rows) > 1 else None
