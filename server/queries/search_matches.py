"""The newest messages that match a search, in bounded time.

Most searches read the newest messages, one slice of time after the other, until there are enough (newest_matches() in
schema.sql). This is fast for words that are common. If the newest messages contain too few matches, the search index
finds the others. It has the conversation of each message and its mentions, too (search_words() in schema.sql). If that
takes too long, more of the newest messages are read, and the result says down to which time.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self
from uuid import UUID

from asyncpg import QueryCanceledError, Record

from protocol.client import Search
from protocol.ids import UserId
from protocol.values import ContentType
from server.db.database import Db
from server.queries import latest
from server.queries.latest import Latest
from server.queries.moment import MOMENT

PROBED, PROBE_MS = 500, 60
"""Max messages that a search reads before it uses the search index, and max time for that, in milliseconds."""
INDEX_MS = 80
"""Max time of the search index, in milliseconds."""
FURTHER, FURTHER_MS = 20_000, 60
"""Max messages that a search reads if the search index takes too long, and max time for that, in milliseconds."""
MAX_OVERRUN = 1_000
"""Max messages by which these are exceeded together. Each has slices of up to 500."""
COMMON = 20
"""If one in `COMMON` of the newest messages matches, the search index would find too many."""
FEW = 50
"""Max conversations that the search index looks up."""
FILES: tuple[ContentType, ...] = ("image", "file", "audio", "video")
LOWEST = UUID(int=0)
"""Below the ids of all messages."""

# Stop words of the language, such as "the" in English, match nothing, and then the query is empty.
QUERY = "SELECT to_tsquery($1)::text"
# The conversation $2, or that of the message $3.
HERE = """
SELECT p.conversation_id, p.role, visible_after(c, p) FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.conversation_id = coalesce($2, (SELECT t.conversation_id FROM message t WHERE t.id = $3))
    AND p.user_id = $1 AND p.status = 'active'
"""
# Times are texts, because Python cannot have all of them.
_SAME = """$1::text::tsquery, $2::uuid[], $3::bigint[], $4::text[], $5::text::timestamptz, $6::uuid, $7::timestamptz,
    $8::uuid, $9::text[], $10::uuid, $11::uuid, $12"""
MATCHES = f"""
SELECT f.at::text, f.message_id, f.messages_read, f.matched, {MOMENT.format(at="f.at")}
FROM newest_matches({_SAME}, $13, $14) f
"""  # noqa: S608 - constants are put in
# The same conditions as in newest_matches(), for the conversation with the number `o.place`.
_FITS = """m.id = s.message_id AND (m.conversation_id = ($2::uuid[])[o.place]) IS TRUE
        AND m.sent_version > ($3::bigint[])[o.place] AND ($8::uuid IS NULL OR m.sender_id = $8)
        AND ($9::text[] IS NULL OR m.content_type = ANY($9))
        AND ($10::uuid IS NULL OR m.thread_root_id = $10 OR m.id = $10)
        AND ($11::uuid IS NULL OR $11 = ANY(m.mentions) OR m.loud_mentions && ARRAY['everyone', ($4::text[])[o.place]])
        AND NOT m.is_deleted AND NOT m.is_moderated"""
# `IS TRUE` keeps the planner from message_search_newest_idx, which it would read whole.
_OLDER = """((s.created_at, s.message_id) < ($5::text::timestamptz, $6::uuid)) IS TRUE
        AND ($7::timestamptz IS NULL OR s.created_at > $7) IS TRUE"""
# Matches are checked one by one, newest first, until there are enough. LATERAL and OFFSET 0 enforce that.
_INDEXED = f"""
SELECT s.created_at::text, s.message_id
FROM (
    SELECT s.message_id, s.conversation_id, s.created_at FROM message_search s
    WHERE s.words @@ $1::text::tsquery AND {_OLDER} AND {{here}}
    ORDER BY s.created_at DESC, s.message_id DESC
) s
CROSS JOIN LATERAL (SELECT array_position($2::uuid[], s.conversation_id) AS place OFFSET 0) o
CROSS JOIN LATERAL (SELECT FROM message m WHERE {_FITS} OFFSET 0) seen
ORDER BY s.created_at DESC, s.message_id DESC LIMIT $12
"""  # noqa: S608 - constants are put in
# The index skips to the entries of each conversation for each match of the words. This takes less time than to read the
# rows of all matches, unless there are many conversations. In one condition with the words, the index would read all
# entries of the conversations.
INDEXED_IN_FEW = _INDEXED.format(here="""
        s.words @@ (SELECT string_agg(quote_literal('c:' || o.id), '|')::tsquery FROM unnest($2::uuid[]) o (id))
""")  # fmt: skip
INDEXED_IN_MANY = _INDEXED.format(here="(s.conversation_id = ANY($2)) IS TRUE")
BRIEFLY = f"SAVEPOINT by_index; SET LOCAL statement_timeout = {INDEX_MS}"
AS_BEFORE = "ROLLBACK TO by_index"
"""Ends the savepoint, also after a time-out, so that the former `statement_timeout` applies again."""
# At most MAX_PINS messages of a conversation are pinned.
PINNED = f"""
SELECT s.created_at::text, s.message_id
FROM unnest($2::uuid[]) WITH ORDINALITY o (id, place)
CROSS JOIN LATERAL (
    SELECT p.id AS message_id, p.created_at FROM message p WHERE p.conversation_id = o.id AND p.is_pinned OFFSET 0
) s
CROSS JOIN LATERAL (SELECT FROM message m WHERE {_FITS} OFFSET 0) seen
WHERE {_OLDER} AND EXISTS (
    SELECT FROM message_search w
    WHERE w.message_id = s.message_id AND ($1::text IS NULL OR w.words @@ $1::text::tsquery) OFFSET 0
)
ORDER BY s.created_at DESC, s.message_id DESC LIMIT $12
"""  # noqa: S608 - constants are put in


class MatchPlace(NamedTuple):
    """A place in the order of messages by time, and then by id. The time is a text, because a restored row may have one
    that Python cannot represent.
    """

    at: str
    id: UUID


class Matches(NamedTuple):
    """Matches, newest first, and the time down to which all messages were read, if older ones may match, too."""

    places: Sequence[MatchPlace]
    down_to: datetime | None = None


class Criteria(NamedTuple):
    """The criteria of a search, as the first parameters of the statements above."""

    query: str | None
    conversations: Sequence[UUID]
    visible: Sequence[int]
    roles: Sequence[str]
    before: MatchPlace
    after: datetime | None
    sender: UserId | None
    kinds: Sequence[ContentType] | None
    thread: UUID | None
    mentioned: UserId | None
    is_pinned: bool

    def before_place(self, at: datetime, one: UUID) -> Self:
        """Return these criteria for messages before the end of a page, which is never after the former `before`."""
        return self._replace(before=MatchPlace(at.isoformat(), one))

    def not_before(self, at: datetime) -> Self:
        """Return these criteria for messages at or after a time."""
        after = at - timedelta(microseconds=1)
        return self._replace(after=after if self.after is None else max(after, self.after))

    def parameters(self, place: MatchPlace) -> list[Any]:
        """Return the parameters for matches that are older than `place`."""
        return [*self[:4], *place, *self[5:-1]]


async def scope(db: Db, user_id: UserId, frame: Search, since: datetime | None) -> Latest:
    """Return the conversations that a search covers. `since` is from an earlier page."""
    if frame.conversation_id is not None or frame.in_thread is not None:
        rows = await db.fetch(HERE, user_id, frame.conversation_id, frame.in_thread)
        return Latest([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], None)
    return await (latest.newest(db, user_id) if since is None else latest.again(db, user_id, since))


async def criteria(
    db: Db, user_id: UserId, frame: Search, words: str | None, *, until: datetime, covered: Latest
) -> Criteria | None:
    """Return the criteria of a search for messages before `until`, or None if nothing can match."""
    query = None if words is None else await db.fetchval(QUERY, words)
    kinds = None if frame.content_type is None else [frame.content_type]
    if frame.has_file:
        kinds = [kind for kind in FILES if kinds is None or kind in kinds]
    if not covered.conversation_ids or query == "" or kinds == []:
        return None
    parts = [] if query is None else [query]
    if frame.hashtag is not None:
        parts.append(f"'h:{frame.hashtag.lower()}'")
    if frame.mentions_me:
        parts.append(" | ".join(f"'m:{one}'" for one in ("everyone", user_id, *sorted(set(covered.roles)))))
    return Criteria(
        query=" & ".join(f"({part})" for part in parts) or None,
        conversations=covered.conversation_ids,
        visible=covered.after,
        roles=covered.roles,
        before=MatchPlace(until.isoformat(), LOWEST),
        after=frame.sent_after,
        sender=frame.sender_id,
        kinds=kinds,
        thread=frame.in_thread,
        mentioned=user_id if frame.mentions_me else None,
        is_pinned=frame.is_pinned,
    )


async def newest(db: Db, asked: Criteria, count: int) -> Matches:
    """Return up to `count` matches, as far as they are found in time. Requires a transaction for searches."""
    if asked.is_pinned:
        return Matches(_places(await db.fetch(PINNED, *asked.parameters(asked.before), count)))
    found, end = await _read(db, asked, asked.before, count, most=PROBED, patience_ms=PROBE_MS)
    if end.is_last(found, count):
        return Matches(found)
    missing = count - len(found)
    is_rare = asked.query is not None and end.matched * COMMON < end.messages_read
    if is_rare and (rest := await _by_index(db, asked, end.place, missing)) is not None:
        return Matches([*found, *rest])
    further, end = await _read(db, asked, end.place, missing, most=FURTHER, patience_ms=FURTHER_MS)
    return Matches([*found, *further], None if end.is_last(further, missing) else end.down_to)


async def again(db: Db, asked: Criteria, count: int) -> Matches:
    """Return up to `count` matches among the messages that an earlier call of `newest` read one by one."""
    most = PROBED + FURTHER + MAX_OVERRUN
    found, end = await _read(db, asked, asked.before, count, most=most, patience_ms=PROBE_MS + 2 * FURTHER_MS)
    return Matches(found, None if end.is_last(found, count) else end.down_to)


async def _by_index(db: Db, asked: Criteria, place: MatchPlace, count: int) -> list[MatchPlace] | None:
    """Return up to `count` matches before a place. Return None if that takes too long."""
    await db.execute(BRIEFLY)
    try:
        if len(asked.conversations) <= FEW:
            rows = await db.fetch(INDEXED_IN_FEW, *asked.parameters(place), count)
        else:
            rows = await db.fetch(INDEXED_IN_MANY, *asked.parameters(place), count)
        found = _places(rows)
    except QueryCanceledError:
        found = None
    await db.execute(AS_BEFORE)
    return found


class _End(NamedTuple):
    """The place at which a statement stopped, if it did, and how many messages it has read and matched."""

    place: MatchPlace
    down_to: datetime | None
    messages_read: int
    matched: int

    def is_last(self, found: Sequence[MatchPlace], count: int) -> bool:
        """Whether the page is full, or no older message matches."""
        return len(found) >= count or self.down_to is None


async def _read(
    db: Db, asked: Criteria, place: MatchPlace, count: int, *, most: int, patience_ms: int
) -> tuple[list[MatchPlace], _End]:
    """Read the messages before a place, newest first, until there are `count` matches."""
    *rows, last = await db.fetch(MATCHES, *asked.parameters(place), count, most, patience_ms)
    at, _, messages_read, matched, moment = last
    return _places(rows), _End(MatchPlace(at, LOWEST), moment, messages_read, matched)


def _places(rows: Sequence[Record]) -> list[MatchPlace]:
    return [MatchPlace(row[0], row[1]) for row in rows]
