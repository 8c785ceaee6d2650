"""What messages are found by, made anew."""

from typing import NamedTuple

from protocol.ids import MessageId
from server.database import Db

AT_ONCE = 2_000

# The rows are locked while their words are made, so that an edit waits for that, or is seen.
PAGE = """
WITH page AS MATERIALIZED (
    SELECT m.* FROM message m WHERE m.id > $1 ORDER BY m.id LIMIT $2 FOR SHARE
), made AS (
    INSERT INTO message_search AS s (message_id, conversation_id, created_at, words)
    SELECT m.id, m.conversation_id, m.created_at,
        search_words(m.conversation_id, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags)
    FROM page m WHERE NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message
        AND NOT ($3 AND EXISTS (SELECT FROM message_search o WHERE o.message_id = m.id))
    ON CONFLICT (message_id) DO UPDATE SET words = excluded.words
    RETURNING 1
)
SELECT (SELECT count(*) FROM made), (SELECT id FROM page ORDER BY id DESC LIMIT 1)
"""


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


class Page(NamedTuple):
    """How many were made, and where to go on."""

    made: int
    last: MessageId


async def page(db: Db, after: MessageId, *, only_missing: bool) -> Page | None:
    """Make the words of the next messages after an id; None if there are no more."""
    made, last = await db.fetchrow(PAGE, after, AT_ONCE, only_missing) or (0, None)
    return None if last is None else Page(made, MessageId(last))
