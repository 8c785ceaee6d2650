"""Rebuilds and maintains the search index."""

from typing import NamedTuple

from protocol.ids import MessageId
from server.db.database import Db

MAX_MESSAGES = 200
"""Max messages per statement."""

# Words are parsed before the locks, because that takes long. `made` counts them, which forces that order. Then messages
# with unchanged content are locked for the time of writing, so that an edit waits for it or is noticed. Messages that
# are locked or were changed meanwhile are left for another call.
PAGE = """
WITH page AS MATERIALIZED (
    SELECT m.id, m.conversation_id, m.created_at, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags,
        search_words(m.conversation_id, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags) AS words
    FROM message m
    WHERE m.id = ANY($1) AND NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message
        AND NOT ($2 AND EXISTS (SELECT FROM message_search o WHERE o.message_id = m.id))
), made AS MATERIALIZED (
    SELECT count(words) FROM page
), free AS MATERIALIZED (
    SELECT p.id, p.conversation_id, p.created_at, p.words
    FROM made, page p JOIN message m ON m.id = p.id AND m.id = ANY($1) AND NOT m.is_deleted AND NOT m.is_moderated
        AND (m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags)
            IS NOT DISTINCT FROM (p.content, p.payload, p.mentions, p.loud_mentions, p.hashtags)
    FOR NO KEY UPDATE OF m SKIP LOCKED
), written AS (
    INSERT INTO message_search AS s (message_id, conversation_id, created_at, words)
    SELECT id, conversation_id, created_at, words FROM free
    ON CONFLICT (message_id) DO UPDATE SET words = excluded.words
)
SELECT (SELECT count(*) FROM free), ARRAY(SELECT id FROM page EXCEPT ALL SELECT id FROM free)
"""
NEXT = "SELECT m.id FROM message m WHERE m.id > $1 ORDER BY m.id LIMIT $2"


# PostgreSQL collects new entries in a pending list. Each search reads the list, and a sender who fills it has to merge
# it. One worker merges it at a time, because others would only wait for its lock on the index.
TIDY = """
SELECT gin_clean_pending_list('message_search_words_idx')
FROM (SELECT FROM server_key WHERE name = 'vapid' FOR NO KEY UPDATE SKIP LOCKED) turn
"""


async def tidy(db: Db) -> None:
    """Merge the pending list of the search index, so that no sender has to. Does nothing while another worker
    does it.
    """
    await db.execute(TIDY)


class IndexedPage(NamedTuple):
    """The number of entries that were written, and the messages to retry later, which were locked or changed
    meanwhile.
    """

    made: int
    left: list[MessageId]


async def following(db: Db, after: MessageId) -> list[MessageId]:
    """Return the next messages after an id, at most `MAX_MESSAGES`."""
    return [MessageId(row[0]) for row in await db.fetch(NEXT, after, MAX_MESSAGES)]


async def page(db: Db, message_ids: list[MessageId], *, only_missing: bool) -> IndexedPage:
    """Write the index entries of messages that need one. Does not wait for locked messages."""
    made, left = await db.fetchrow(PAGE, message_ids, only_missing) or (0, [])
    return IndexedPage(made, [MessageId(one) for one in left])
