"""What messages are found by, made anew."""

from typing import NamedTuple

from protocol.ids import MessageId
from server.db.database import Db

AT_ONCE = 200
"""Max messages of one statement."""

# Words are made before anything is locked, as that takes long; `made` counts them, so that it is done by then. Then the
# messages whose words are still the same are locked, for as long as writing takes, so that an edit waits for that or is
# seen. Those that somebody holds, or has changed meanwhile, are left for another time.
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


# What was added last waits in a list, which each search reads through, and which whoever finds it full has to sort in.
# One worker does that at a time: the others would wait for its lock on the index, for nothing.
TIDY = """
SELECT gin_clean_pending_list('message_search_words_idx')
FROM (SELECT FROM server_key WHERE name = 'vapid' FOR NO KEY UPDATE SKIP LOCKED) turn
"""


async def tidy(db: Db) -> None:
    """Sort in what was added to the index of words: so that nobody who sends a message has to. Does nothing while
    another worker does.
    """
    await db.execute(TIDY)


class IndexedPage(NamedTuple):
    """How many were made, and which messages were held or changed meanwhile: to be made later."""

    made: int
    left: list[MessageId]


async def following(db: Db, after: MessageId) -> list[MessageId]:
    """Return the next messages after an id, at most `AT_ONCE`."""
    return [MessageId(row[0]) for row in await db.fetch(NEXT, after, AT_ONCE)]


async def page(db: Db, message_ids: list[MessageId], *, only_missing: bool) -> IndexedPage:
    """Make the words of messages, of those that have some. Waits for nobody who changes one of them."""
    made, left = await db.fetchrow(PAGE, message_ids, only_missing) or (0, [])
    return IndexedPage(made, [MessageId(one) for one in left])
