"""The badge of a user: the numbers of unread messages and of unseen entries of the feed.

Both concern the user's conversations with the latest activity. Finding these takes most of the time, so one statement
finds them for both.
"""

from protocol.ids import UserId
from protocol.server import Badge
from server.db.database import Db
from server.queries import feed
from server.queries.conversation_views import ACTIVE_AT
from server.queries.latest import AS_COLUMNS, SEARCHED, Latest
from server.queries.unread import IS_COUNTED, of_conversations

_UNREAD = of_conversations("SELECT me.* FROM mine me WHERE me.is_counted", "me.active_at DESC, me.conversation_id DESC")
# PostgreSQL 17 and later use the order of `mine`, so they sort once.
READ = f"""
WITH mine AS MATERIALIZED (
    SELECT me.conversation_id, me.user_id, me.role, me.unread_from_version, me.last_read_version,
        visible_after(c, me) AS after, {ACTIVE_AT} AS active_at, {IS_COUNTED} AS is_counted
    FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
    WHERE me.user_id = $1 AND me.status = 'active'
    ORDER BY active_at DESC, conversation_id DESC
)
SELECT ({_UNREAD}), {AS_COLUMNS}
FROM (SELECT * FROM mine ORDER BY active_at DESC, conversation_id DESC LIMIT {SEARCHED + 1}) l
"""  # noqa: S608 - constants are put in


async def of(db: Db, user_id: UserId) -> Badge:
    """Return the badge of a user. Requires a transaction for searches."""
    unseen = await feed.unseen(db, user_id)
    messages, *latest = (await db.fetch(READ, user_id))[0]
    return Badge(messages=messages, feed=await feed.count(db, unseen, Latest.of(*latest)))
