"""Rebuilds and maintains the search index."""

from typing import NamedTuple

from protocol.ids import MessageId
from server.db.database import Db

MAX_MESSAGES = 200
"""Max messages per statement."""
MAX_ROWS = 64
"""Max rows of `search_queue` per statement. Each has the messages of one statement that sent some."""
FIRST = "0"
"""A `floor` below that of all rows."""

# Words are parsed before the locks, because that takes long. `made` counts them, which forces that order. Then messages
# with unchanged content are locked for the time of writing, so that an edit waits for it or is noticed. Messages that
# are locked or were changed meanwhile are left for another call.
_WRITTEN = """
page AS MATERIALIZED (
    SELECT m.id, m.conversation_id, m.created_at, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags,
        search_words(m.conversation_id, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags) AS words
    FROM message m
    WHERE m.id = ANY({ids}) AND NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message {also}
), made AS MATERIALIZED (
    SELECT count(words) FROM page
), free AS MATERIALIZED (
    SELECT p.id, p.conversation_id, p.created_at, p.words
    FROM made, page p JOIN message m ON m.id = p.id AND m.id = ANY({ids}) AND NOT m.is_deleted AND NOT m.is_moderated
        AND (m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags)
            IS NOT DISTINCT FROM (p.content, p.payload, p.mentions, p.loud_mentions, p.hashtags)
    FOR NO KEY UPDATE OF m SKIP LOCKED
), written AS (
    INSERT INTO message_search AS s (message_id, conversation_id, created_at, words)
    SELECT id, conversation_id, created_at, words FROM free
    ON CONFLICT (message_id) DO UPDATE SET words = excluded.words
), left_over AS MATERIALIZED (
    SELECT id FROM page EXCEPT ALL SELECT id FROM free
)
"""
_MISSING = "AND NOT ($2 AND EXISTS (SELECT FROM message_search o WHERE o.message_id = m.id))"
PAGE = f"""
WITH {_WRITTEN.format(ids="$1", also=_MISSING)}
SELECT (SELECT count(*) FROM free), ARRAY(SELECT id FROM left_over)
"""  # noqa: S608 - constants are put in
# The rows that another worker has taken are skipped. The commit need not wait for the disk, since a crash would undo
# all of it.
WAITING = f"""
WITH taken AS MATERIALIZED (
    SELECT q.ctid AS place, q.message_ids FROM search_queue q WHERE q.before_xid >= $1::text::xid8
    ORDER BY q.before_xid LIMIT {MAX_ROWS} FOR UPDATE SKIP LOCKED
), part AS MATERIALIZED (
    SELECT f.place, f.message_ids FROM (
        SELECT t.place, t.message_ids, sum(cardinality(t.message_ids)) OVER (ORDER BY t.place) AS total FROM taken t
    ) f WHERE f.total - cardinality(f.message_ids) < {MAX_MESSAGES}
), gone AS (
    DELETE FROM search_queue q WHERE q.ctid = ANY(ARRAY(SELECT p.place FROM part p))
), {_WRITTEN.format(ids="ARRAY(SELECT unnest(p.message_ids) FROM part p)", also="")}, returned AS (
    INSERT INTO search_queue (message_ids) SELECT array_agg(l.id) FROM left_over l HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM part), (SELECT count(*) FROM left_over), pg_snapshot_xmin(pg_current_snapshot())::text
FROM (SELECT set_config('synchronous_commit', 'off', true)) is_set
"""  # noqa: S608 - constants are put in
NEXT = "SELECT m.id FROM message m WHERE m.id > $1 ORDER BY m.id LIMIT $2"


# PostgreSQL collects new entries in a pending list. Each search reads the list, and a statement that fills it has to
# merge it. One worker merges it at a time, because others would only wait for its lock on the index.
TIDY = """
SELECT gin_clean_pending_list('message_search_words_idx')
FROM (SELECT FROM server_key WHERE name = 'vapid' FOR NO KEY UPDATE SKIP LOCKED) turn
"""


async def tidy(db: Db) -> None:
    """Merge the pending list of the search index, so that no other statement has to. Does nothing while another
    worker does it.
    """
    await db.execute(TIDY)


class IndexedBatch(NamedTuple):
    """The number of rows of the queue that were taken, and of messages that wait again, because they were locked or
    changed meanwhile. Statements that begin later write rows with a `before_xid` of at least `floor`.
    """

    taken: int
    left: int
    floor: str


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


async def waiting(db: Db, floor: str) -> IndexedBatch:
    """Write the index entries of some messages that wait, from rows with a `before_xid` of at least `floor`. Does not
    wait for locked messages.
    """
    taken, left, least = await db.fetchrow(WAITING, floor) or (0, 0, floor)
    return IndexedBatch(taken, left, least)
